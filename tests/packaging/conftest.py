"""A clean copy of this checkout and the wheel of it, each made once."""

import sys
from pathlib import Path

import pytest

from .building import build_flags, clean_copy, run


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", *build_flags())
    run(*pip, sources, "-w", out, cwd=out)
    (built,) = out.glob("*.whl")
    return built
