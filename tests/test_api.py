"""The public face: what `lmc` exports, and that it comes without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmc

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "sglang"):
    sys.modules[name] = None  # importing it raises ImportError
import lmc
assert set(dir(lmc)) == set(lmc.__all__)
for name in lmc.__all__:
    getattr(lmc, name)
"""

NOTHING_ELSE = """
import sys
import lmc.plugins
print(*sorted(name for name in sys.modules if name.startswith(("lmc", "xxhash"))))
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_exported_name_is_there() -> None:
    assert sorted(lmc.__all__) == sorted(dir(lmc))
    for name in lmc.__all__:
        assert getattr(lmc, name) is not None


def test_types_and_runtime_agree_on_the_names() -> None:
    """What mypy sees (the imports under TYPE_CHECKING) is what `__getattr__` hands out."""
    tree = ast.parse((ROOT / "lmc" / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lmc._HOME
    assert {*seen, "__version__"} == set(lmc.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TieredStor'"):
        lmc.TieredStor  # noqa: B018


def test_all_of_it_imports_without_torch_numpy_and_engine() -> None:
    python(WITHOUT_TORCH)


def test_an_engine_that_leaves_lmc_off_imports_nothing_of_the_store() -> None:
    loaded = python(NOTHING_ELSE).split()
    assert loaded == ["lmc", "lmc.config", "lmc.layout", "lmc.plugins"]
