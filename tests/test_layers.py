"""The layer check sees what it is for."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest

CHECK = run_path(str(Path(__file__).parent.parent / "ci" / "layers.py"), run_name="layers")
ROOT = Path(__file__).parent.parent


def test_the_tree_is_clean():
    assert list(CHECK["violations"](ROOT)) == []


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("lmc/tiers/ram.py", "from ..store import TieredStore", "not below it"),
        ("lmc/keys.py", "from . import config", "not below it"),
        ("lmc/store.py", "import torch", "only lmc.transfer"),
        ("lmc/store.py", "import sglang.srt", "knows no engine"),
        ("lmc/transfer/ops.py", "import lmc_sglang", "knows no engine"),
        ("lmc/store.py", "import pickle", "never become code"),
        ("integrations/x/y.py", "import torch\ntorch.load(f)", "never become code"),
        ("lmc/keys.py", "eval(x)", "never become code"),
        ("lmc/store.py", "import os\nos.environ.get('LMC_X')", "only lmc/config.py"),
        ("lmc/store.py", "import os\nos.environ['LMC_X']", "only lmc/config.py"),
        ("lmc/store.py", "try:\n    f()\nexcept Exception:\n    pass", "catches everything"),
        ("lmc/store.py", "try:\n    f()\nexcept:\n    g()", "catches everything"),
    ],
)
def test_a_violation_is_found(tmp_path, path, code, found):
    for top in ("lmc", "integrations"):
        (tmp_path / top).mkdir()
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    (violation,) = CHECK["violations"](tmp_path)
    assert found in violation[2]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("lmc/store.py", "from .tiers.ram import RamTier\nfrom lmc import keys"),
        ("lmc/config.py", "import os\nos.environ['LMC_X']"),
        ("lmc/tiers/guard.py", "try:\n    f()\nexcept Exception:\n    pass"),
        ("lmc/store.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        ("lmc/cli/doctor.py", "import torch\nfrom lmc.store import TieredStore"),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, code):
    (tmp_path / "integrations").mkdir()
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert list(CHECK["violations"](tmp_path)) == []
