"""Bugs planted in the Triton kernels are seen by the ways to run them that ci/mutants.toml names,
and by no other. Triton is in the SGLang environment.
"""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here: ci/test.sh has SGLang's")

from ci import mutants

from .executors import ROOT, KernelBackend, judge
from .triton_ways import NAME, make

pytestmark = pytest.mark.slow

WAYS = ("triton", "triton sm_90", "triton gfx942")


@pytest.mark.parametrize("bug", mutants.planted_triton(), ids=lambda bug: bug.name)
def test_the_bug_is_seen(bug: mutants.KernelBug, tmp_path: Path) -> None:
    (tmp_path / NAME).parent.mkdir(parents=True)
    shutil.copy(ROOT / NAME, tmp_path / NAME)
    mutants.plant(bug, tmp_path)
    assert [way for way in WAYS if judge(KernelBackend(make(way, tmp_path)))] == bug.seen_by
