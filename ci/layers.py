#!/usr/bin/env python3
"""Checks the rules of the house that a reader would have to remember. Prints file:line: what.

    integrations -> transfer -> cuda, hip -> kernels -> layout, config, stats
          |             '-----> cpu ------------------> layout, config, stats
          '------> store -> tiers --------------------> layout, keys, config, stats

Left may import right, never back. `cli` may import all, only `__main__` imports it; nobody imports
`testing`. Also: the core imports the standard library and xxhash alone; nothing unpickles or
evaluates what comes from outside; LMC_* is read in config.py; broad excepts stand in the guard.
What belongs to one vendor's GPUs is named in lmc/cuda or lmc/hip alone, and the device code that
both share has no #if.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = frozenset({"layout", "keys", "config", "stats"})
COPY = frozenset({"kernels", "cuda", "hip", "cpu"})
TIERS = BASE | {"tiers"}
STORE = TIERS | {"store"}
TRANSFER = COPY | {"layout", "config", "stats", "transfer"}

MAY_IMPORT: dict[str, frozenset[str]] = {
    "__init__": STORE,  # lazily: it only says where the public names live
    "plugins": frozenset({"config"}),
    "layout": frozenset(),
    "keys": frozenset(),
    "stats": frozenset(),
    "config": frozenset({"layout"}),
    "weights": frozenset(),
    "tiers": TIERS,
    "store": STORE,
    **dict.fromkeys(("kernels", "cpu"), frozenset({"layout", "config", "stats"})),
    **dict.fromkeys(("cuda", "hip"), frozenset({"layout", "config", "stats", "kernels"})),
    "transfer": TRANSFER,
    "testing": STORE | {"testing"},
    "cli": STORE | TRANSFER | {"__init__", "weights", "cli"},
    "__main__": frozenset({"__init__", "cli"}),
}
"""Parts of the package lmc, and the parts each may import; `cpu` may import itself."""
INTEGRATIONS = STORE | TRANSFER | {"__init__", "weights"}

CORE = STORE | {"weights"}
CORE_NEEDS = frozenset({"xxhash"})
"""What the core imports beside the standard library."""
CLIENTS = {
    "tiers": frozenset({"redis", "obstore", "mooncake", "nixl"}),
    "weights": frozenset({"huggingface_hub"}),
}
"""What a part may import inside a function, when it is needed: a tier when its URL is opened."""

FORBIDDEN = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
FORBIDDEN_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
VENDOR_NAMES = {
    "cuda": re.compile(r"(cu|cuda|nvrtc)[A-Z]\w*|__(ld|st)[a-z]{1,2}|__device__|(thread|block)Idx"),
    "hip": re.compile(r"(hip|hiprtc)[A-Z]\w*|__builtin_amdgcn_\w+|address_space"),
}
"""Calls of a driver, and words of device code, by the one part of lmc that may use them."""
SHARED_DEVICE_CODE = "lmc/kernels/"
NATIVE_SUFFIXES = (".c", ".h", ".cu", ".hip")
GUARD = "lmc/tiers/guard.py"
SETTINGS = "lmc/config.py"


class Found(NamedTuple):
    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class Import(NamedTuple):
    module: str
    line: int
    at_top: bool


def check(root: Path) -> list[Found]:
    """Everything wrong in `root`/lmc and `root`/integrations."""
    found: list[Found] = []
    for folder in ("lmc", "integrations"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"), name)
            found += [Found(name, line, what) for line, what in check_file(name, tree)]
    for path in sorted((root / "lmc").rglob("*")):
        if path.suffix in NATIVE_SUFFIXES:
            name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            found += [Found(name, line, what) for line, what in check_native(name, text)]
    return found


def check_native(name: str, text: str) -> Iterator[tuple[int, str]]:
    """What is wrong in a file of C or device code; comments may say what they like."""
    comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    code = comment.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(code.splitlines(), 1):
        for word in re.findall(r"\w+", line):
            yield from ((number, what) for what in check_vendor(place(name)[1], word))
        if name.startswith(SHARED_DEVICE_CODE) and re.match(r"\s*#\s*(if|el)", line):
            yield number, "shared device code has no #if: what differs stands in a device.h"


def check_vendor(part: str, word: str) -> Iterator[str]:
    for vendor, names in VENDOR_NAMES.items():
        if part != vendor and names.fullmatch(word):
            yield f"names {word}, which lmc/{vendor} alone may"


def check_file(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What is wrong in one file, given by its path from the root."""
    package, part = place(name)
    for imported in imports(name, tree):
        yield from check_import(package, part, imported)
    for node in ast.walk(tree):
        yield from check_node(name, package, part, node)


def place(name: str) -> tuple[str, str]:
    """The package a file belongs to, and its part: "lmc/tiers/ram.py" is ("lmc", "tiers")."""
    parts = Path(name).with_suffix("").parts
    if parts[0] == "integrations":
        return parts[1], ""
    return "lmc", parts[1]


def imports(name: str, tree: ast.Module) -> Iterator[Import]:
    """Absolute names of all that a file imports, types included."""
    parts = Path(name).with_suffix("").parts
    package = parts[1:-1] if parts[0] == "integrations" else parts[:-1]
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            if module == "lmc" or not node.module:  # each name may be a part
                yield from (
                    Import(f"{module}.{alias.name}", node.lineno, at_top) for alias in node.names
                )
            else:
                yield Import(module, node.lineno, at_top)


def check_import(package: str, part: str, imported: Import) -> Iterator[tuple[int, str]]:
    top, _, rest = imported.module.partition(".")
    if top in FORBIDDEN:
        yield imported.line, f"imports {top}: nothing from outside is unpickled"
    if top == "lmc":
        target = rest.partition(".")[0]
        target = target if target in MAY_IMPORT else "__init__"
        allowed = INTEGRATIONS if package != "lmc" else MAY_IMPORT.get(part)
        if allowed is None:
            yield imported.line, f"lmc.{part} has no place in the layers of ci/layers.py"
        elif target not in allowed and not (target == part and part in COPY):
            yield imported.line, f"{_whole(package, part)} may not import lmc.{target}"
    elif package == "lmc" and part in CORE:
        client = top in CLIENTS.get(part, frozenset()) and not imported.at_top
        if top not in sys.stdlib_module_names | CORE_NEEDS and not client:
            yield imported.line, f"the core may not import {top}"
    elif top.startswith("lmc_") and top != package and (package != "lmc" or part != "cli"):
        yield imported.line, f"{_whole(package, part)} may not import {top}"


def _whole(package: str, part: str) -> str:
    return f"{package}.{part}" if part else package


def check_node(name: str, package: str, part: str, node: ast.AST) -> Iterator[tuple[int, str]]:
    match node:
        case (
            ast.Name(id=word)
            | ast.Attribute(attr=word)
            | ast.alias(name=word)
            | ast.Constant(value=str(word))
        ):
            yield from ((node.lineno, what) for what in check_vendor(part, word))
    match node:
        case ast.Call(func=ast.Name(id=called)) if called in FORBIDDEN_CALLS:
            yield node.lineno, f"calls {called}"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            yield node.lineno, "uses torch.load: nothing from outside is unpickled"
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            yield node.value.lineno, "allows pickles"
        case ast.ExceptHandler(type=caught) if name != GUARD and _is_broad(caught):
            yield node.lineno, f"a broad except: it stands in {GUARD} alone"
        case (
            ast.Call(func=ast.Attribute(attr="suppress"), args=args)
            | ast.Call(func=ast.Name(id="suppress"), args=args)
        ) if any(_is_broad(caught) for caught in args):
            yield node.lineno, f"a broad suppress: broad excepts stand in {GUARD} alone"
        case (
            ast.Subscript(value=env, slice=key)
            | ast.Call(func=ast.Attribute(value=env), args=[key, *_])
            | ast.Compare(left=key, comparators=[env])
        ) if name != SETTINGS and _is_environ(env) and _is_ours(key):
            yield node.lineno, f"reads LMC_*: {SETTINGS} does"
        case ast.Call(
            func=ast.Attribute(attr="getenv") | ast.Name(id="getenv"), args=[key, *_]
        ) if name != SETTINGS and _is_ours(key):
            yield node.lineno, f"reads LMC_*: {SETTINGS} does"
        case ast.Attribute(attr="environ") if (
            package == "lmc" and part in CORE and name != SETTINGS
        ):
            yield node.lineno, f"reads the environment: {SETTINGS} does"


def _is_broad(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        one is None or (isinstance(one, ast.Name) and one.id in ("Exception", "BaseException"))
        for one in names
    )


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def _is_ours(key: ast.expr) -> bool:
    """Whether an environment variable's name is, or may be, one of ours."""
    return not isinstance(key, ast.Constant) or str(key.value).startswith("LMC_")


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    found = check(root)
    for one in found:
        print(one)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
