#!/usr/bin/env python3
"""Who may import whom, and what nobody may do. Read from the source; run by ci/check.sh.

A module may import from its own layer and from layers further down in LAYERS, never back. Prints
every violation as `file:line: what`, exits 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

# Layer -> layers it may import besides its own. `lmc.__main__`, `lmc.cli` and `lmc` itself may
# import all of lmc.
LAYERS = {
    "stats": set(),
    "keys": set(),
    "layout": set(),
    "weights": set(),
    "config": {"layout"},
    "plugins": {"config"},
    "cpu": {"layout", "config", "stats"},
    "cuda": {"layout", "config", "stats"},
    "hip": {"layout", "config", "stats"},
    "kernels": {"layout", "config", "stats"},
    "transfer": {"kernels", "cuda", "hip", "cpu", "layout", "config", "stats"},
    "tiers": {"layout", "keys", "config", "stats"},
    "store": {"tiers", "layout", "keys", "config", "stats"},
    "testing": {"tiers", "store", "layout", "keys", "config", "stats"},
}
ABOVE = {"", "__main__", "cli"}
ENGINES = {"sglang", "vllm"}
KNOWS_TORCH = {"transfer", "cli", "__main__"}
NO_CODE_FROM_BYTES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
READS_ENVIRONMENT = {"lmc/config.py"}
CATCHES_ALL = {"lmc/tiers/guard.py"}


def main() -> int:
    wrong = [f"{path}:{line}: {what}" for path, line, what in violations(ROOT)]
    print("\n".join(wrong) if wrong else "layers: clean")
    return 1 if wrong else 0


def violations(root: Path) -> Iterator[tuple[str, int, str]]:
    for top in ("lmc", "integrations"):
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            tree = ast.parse(file.read_text(), path)
            for line, what in [*_imports(path, tree), *_habits(path, tree)]:
                yield path, line, what


def _imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, module in imported(path, tree):
        parts = module.split(".")
        if parts[0] in NO_CODE_FROM_BYTES:
            yield line, f"imports {module}: bytes from outside never become code"
        if not path.startswith("lmc/"):
            continue
        layer = path.split("/")[1].removesuffix(".py").replace("__init__", "")
        if parts[0] in ENGINES or parts[0].startswith("lmc_"):
            yield line, f"imports {module}: lmc knows no engine"
        if parts[0] == "torch" and layer not in KNOWS_TORCH:
            yield line, f"imports {module}: only lmc.transfer knows torch"
        if parts[0] == "lmc" and layer not in ABOVE:
            target = parts[1] if len(parts) > 1 else ""
            if target not in LAYERS.get(layer, set()) | {layer}:
                yield line, f"lmc.{layer} imports {module}: not below it"


def imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Absolute names of all modules a file imports."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if node.module and stem != "lmc":
                yield node.lineno, stem
            else:
                for alias in node.names:
                    yield node.lineno, f"{stem}.{alias.name}"


def _habits(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "torch.load"):
                yield node.lineno, f"calls {name}: bytes from outside never become code"
        if isinstance(node, ast.Constant) and path not in READS_ENVIRONMENT:
            yield from _reads_setting(node, tree)
        if isinstance(node, ast.ExceptHandler) and path not in CATCHES_ALL:
            caught = "" if node.type is None else ast.unparse(node.type)
            if caught in ("", "Exception", "BaseException") and not _raises(node):
                yield node.lineno, "catches everything: only the guard around tiers may"


def _reads_setting(constant: ast.Constant, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """LMC_... where the environment is read: environ["LMC_X"], environ.get("LMC_X"), getenv(...)."""
    if not str(constant.value).startswith("LMC_"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and node.slice is constant:
            where = ast.unparse(node.value)
        elif isinstance(node, ast.Call) and constant in node.args:
            where = ast.unparse(node.func)
        else:
            continue
        if "environ" in where or "getenv" in where:
            yield constant.lineno, f"reads {constant.value}: only lmc/config.py reads settings"


def _raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler passes on what it caught."""
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


if __name__ == "__main__":
    sys.exit(main())
