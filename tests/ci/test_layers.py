"""The layer check: the repository passes, and every rule bites."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ci import layers

ROOT = Path(__file__).parents[2]


def complaints(name: str, source: str) -> list[str]:
    return [what for _, what in layers.check_file(name, ast.parse(source))]


def test_the_repository_keeps_its_layers() -> None:
    assert layers.check(ROOT) == []


def test_every_part_of_lmc_has_its_place() -> None:
    parts = {layers.place(f"lmc/{path.name}")[1] for path in (ROOT / "lmc").glob("*.py")}
    parts |= {path.parent.name for path in (ROOT / "lmc").glob("*/__init__.py")}
    assert parts <= set(layers.MAY_IMPORT)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lmc/store.py", "from .tiers.ram import RamTier"),
        ("lmc/store.py", "from lmc.keys import Key"),
        ("lmc/tiers/disk.py", "from ..keys import Name\nfrom .frame import seal"),
        ("lmc/tiers/frame.py", "import xxhash"),
        ("lmc/tiers/redis.py", "def open(url):\n    import redis"),
        ("lmc/tiers/__init__.py", "from .disk import DiskTier\nfrom ..config import Config"),
        ("lmc/transfer/ops.py", "import torch\nfrom .. import cpu\nfrom ..layout import KVLayout"),
        ("lmc/cpu/__init__.py", "from . import loader\nfrom ..stats import Stats"),
        ("lmc/testing/faulty.py", "from ..tiers.tier import Tier\nimport pytest"),
        ("lmc/cli/doctor.py", "from lmc_sglang import compat\nfrom ..store import TieredStore"),
        ("lmc/__main__.py", "from lmc import __version__\nfrom lmc.cli import doctor"),
        ("integrations/lmc_sglang/linker.py", "import sglang, torch\nfrom . import pools"),
        ("integrations/lmc_sglang/linker.py", "from lmc.store import TieredStore"),
        ("integrations/lmc_sglang/linker.py", "import lmc\nfrom lmc.transfer import Copier"),
        ("lmc/tiers/guard.py", "try: f()\nexcept Exception: pass"),
        ("lmc/store.py", "try: f()\nexcept (OSError, ValueError): pass"),
        ("lmc/config.py", "import os\nos.environ['LMC_SALT']"),
        ("integrations/lmc_sglang/switch.py", "import os\nos.environ.get('SGLANG_X')"),
        ("lmc/transfer/ops.py", "model.eval()"),
        ("lmc/cuda/driver.py", "library.cuLaunchKernel()\ngetattr(library, 'cudaHostRegister')"),
        ("lmc/hip/driver.py", "library.hipModuleLaunchKernel()"),
        ("lmc/transfer/ops.py", "'says cuMemcpyBatchAsync'\ntorch.cuda.synchronize()"),
    ],
)
def test_what_is_allowed(name: str, source: str) -> None:
    assert complaints(name, source) == []


@pytest.mark.parametrize(
    ("name", "source", "what"),
    [
        ("lmc/keys.py", "from .store import TieredStore", "lmc.keys may not import lmc.store"),
        ("lmc/keys.py", "from . import store", "lmc.keys may not import lmc.store"),
        ("lmc/keys.py", "import lmc.tiers.ram", "lmc.keys may not import lmc.tiers"),
        ("lmc/layout.py", "from .config import Config", "lmc.layout may not import lmc.config"),
        ("lmc/tiers/ram.py", "from ..store import Ticket", "lmc.tiers may not import lmc.store"),
        ("lmc/tiers/ram.py", "from ..transfer import x", "lmc.tiers may not import lmc.transfer"),
        ("lmc/store.py", "from .transfer import Copier", "lmc.store may not import lmc.transfer"),
        ("lmc/store.py", "from lmc import transfer", "lmc.store may not import lmc.transfer"),
        ("lmc/store.py", "from .testing import FaultyTier", "lmc.store may not import lmc.testing"),
        ("lmc/transfer/x.py", "from ..store import T", "lmc.transfer may not import lmc.store"),
        ("lmc/transfer/x.py", "from ..tiers import T", "lmc.transfer may not import lmc.tiers"),
        ("lmc/cpu/__init__.py", "from ..transfer import T", "lmc.cpu may not import lmc.transfer"),
        ("lmc/cuda/__init__.py", "from .. import cpu", "lmc.cuda may not import lmc.cpu"),
        ("lmc/store.py", "from .cli import doctor", "lmc.store may not import lmc.cli"),
        ("lmc/extra.py", "from .keys import Key", "lmc.extra has no place in the layers"),
        (
            "lmc/tiers/ram.py",
            "if TYPE_CHECKING:\n    from ..store import Ticket",
            "lmc.tiers may not import lmc.store",
        ),
        ("lmc/store.py", "def f():\n    from .transfer import x", "may not import lmc.transfer"),
        ("lmc/store.py", "import torch", "the core may not import torch"),
        ("lmc/store.py", "def f():\n    import torch", "the core may not import torch"),
        ("lmc/tiers/disk.py", "from sglang.srt import x", "the core may not import sglang"),
        ("lmc/keys.py", "import numpy as np", "the core may not import numpy"),
        ("lmc/tiers/redis.py", "import redis", "the core may not import redis"),
        ("lmc/store.py", "def f():\n    import redis", "the core may not import redis"),
        ("lmc/transfer/ops.py", "import lmc_sglang", "lmc.transfer may not import lmc_sglang"),
        ("integrations/lmc_vllm/x.py", "import lmc_sglang", "lmc_vllm may not import lmc_sglang"),
        ("integrations/lmc_vllm/x.py", "from lmc.cli import x", "may not import lmc.cli"),
        ("integrations/lmc_vllm/x.py", "from lmc.testing import x", "may not import lmc.testing"),
        ("lmc/tiers/disk.py", "import pickle", "imports pickle"),
        ("integrations/lmc_vllm/x.py", "from marshal import loads", "imports marshal"),
        ("lmc/transfer/x.py", "import torch\ntorch.load(path)", "uses torch.load"),
        ("lmc/transfer/x.py", "numpy.load(path, allow_pickle=True)", "allows pickles"),
        ("lmc/config.py", "eval(text)", "calls eval"),
        ("lmc/config.py", "exec(text)", "calls exec"),
        ("lmc/config.py", "__import__(text)", "calls __import__"),
        ("lmc/store.py", "try: f()\nexcept Exception: pass", "a broad except"),
        ("lmc/store.py", "try: f()\nexcept BaseException as e: pass", "a broad except"),
        ("lmc/store.py", "try: f()\nexcept: pass", "a broad except"),
        ("lmc/store.py", "try: f()\nexcept (OSError, Exception): pass", "a broad except"),
        ("integrations/lmc_vllm/x.py", "try: f()\nexcept Exception: pass", "a broad except"),
        ("lmc/store.py", "with contextlib.suppress(Exception): f()", "a broad suppress"),
        ("lmc/store.py", "with suppress(OSError, Exception): f()", "a broad suppress"),
        ("lmc/cli/x.py", "os.environ['LMC_SALT']", "reads LMC_*"),
        ("lmc/cli/x.py", "os.environ.get('LMC_SALT', '')", "reads LMC_*"),
        ("lmc/cli/x.py", "'LMC_SALT' in os.environ", "reads LMC_*"),
        ("lmc/cli/x.py", "os.getenv('LMC_SALT')", "reads LMC_*"),
        ("lmc/cli/x.py", "environ['LMC_SALT']", "reads LMC_*"),
        ("lmc/cli/x.py", "os.environ[name]", "reads LMC_*"),
        ("lmc/tiers/disk.py", "read(os.environ)", "reads the environment"),
        ("lmc/transfer/x.py", "library.cuInit(0)", "names cuInit, which lmc/cuda alone may"),
        ("lmc/hip/driver.py", "getattr(library, 'cudaHostRegister')", "names cudaHostRegister"),
        ("lmc/cuda/driver.py", "library.hipInit(0)", "names hipInit, which lmc/hip alone may"),
        ("integrations/lmc_vllm/x.py", "x.hipHostMalloc()", "names hipHostMalloc"),
    ],
)
def test_what_is_refused(name: str, source: str, what: str) -> None:
    found = complaints(name, source)
    assert found
    assert what in found[0]


@pytest.mark.parametrize(
    ("name", "source", "what"),
    [
        ("lmc/kernels/pages.h", "int i = threadIdx.x;", "names threadIdx"),
        ("lmc/kernels/pages.h", "__ldcs(p);", "names __ldcs"),
        ("lmc/kernels/pages.h", "/* here */ __builtin_amdgcn_workitem_id_x();", "names __builtin"),
        ("lmc/kernels/pages.h", "#ifdef __HIP__", "no #if"),
        ("lmc/kernels/pages.h", "#  elif X", "no #if"),
        ("lmc/cuda/pages.cu", "hipMalloc();", "names hipMalloc"),
        ("lmc/hip/device.h", "x = blockIdx.x;", "names blockIdx"),
        ("lmc/cpu/pages.c", "cuInit(0);", "names cuInit"),
    ],
)
def test_device_code_that_is_refused(name: str, source: str, what: str) -> None:
    comment = "// hipInit, cuInit, __ldcs\n/*\n#if\n*/\n"
    ((line, found),) = layers.check_native(name, comment + source)
    assert line == 5
    assert what in found


def test_the_command_says_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "lmc").mkdir()
    (tmp_path / "lmc" / "store.py").write_text("import os\nimport torch\n")
    command = [sys.executable, str(ROOT / "ci" / "layers.py"), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stdout == "lmc/store.py:2: the core may not import torch\n"
    (tmp_path / "lmc" / "store.py").write_text("import os\n")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")
