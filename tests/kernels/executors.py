"""Ways to run the kernels without a GPU, each behind the backend that the other tests know.

cuda-host, hip-host       the source of each vendor, as C++
compute_80                the PTX that ships
compute_100               the PTX that NVRTC makes sm_100 of
gfx90a to gfx1201         the assembly of the objects that ship
"""

import ctypes
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from ci import native
from lmc import cuda, hip
from lmc.kernels import BLOCK, GATHER, SCATTER, PagesArgs, Tables, before, pages_args, starts
from lmc.transfer.ops import Backend
from lmc.transfer.pages import Transfer
from lmc.transfer.reference import TorchBackend

from . import cdna, ptx
from .cases import CASES
from .memory import Fault, Memory

HOSTS = ("cuda-host", "hip-host")
PTX = ("compute_80", "compute_100")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
ROOT = native.ROOT
GRID = 2  # few, so that every crew has several slices to move
HOST_FLAGS = ["-std=c++17", "-g", "-shared", "-fPIC", "-Wno-attributes", "-Wno-unknown-pragmas"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Executor(Protocol):
    wave: int

    def launch(self, op: str, args: PagesArgs, memory: Memory) -> None: ...


class KernelBackend:
    """Moves pages by launches, as the GPU backends will."""

    def __init__(self, executor: Executor, grid: int = GRID) -> None:
        self.name = type(executor).__name__
        self.executor, self.grid = executor, grid

    def gather(self, transfer: Transfer, planes: range) -> None:
        self._launch(GATHER, transfer, planes)

    def scatter(self, transfer: Transfer, planes: range) -> None:
        self._launch(SCATTER, transfer, planes)

    def _launch(self, op: str, transfer: Transfer, planes: range) -> None:
        pool, memory = transfer.pool, Memory()
        for plane in pool.planes:
            memory.add_address(
                plane.data_ptr(), (pool.num_pages - 1) * plane.stride(0) + plane.shape[1]
            )
        for piece in transfer.pieces:
            memory.add_address(piece.address, pool.chunk_bytes(piece.chunk_pages))
        tables = Tables(
            memory.add_table(pool.table),
            memory.add_table(before(pool.table)),
            memory.add_table(transfer.table),
            memory.add_table(starts(transfer.table)),
            memory.add_table(transfer.page_ids.tolist()),
        )
        args = pages_args(
            pool.table, planes, transfer.table, tables, wave=self.executor.wave, grid=self.grid
        )
        if args:
            self.executor.launch(op, args, memory)


class Host:
    """A library made by `host_library`."""

    def __init__(self, library: Path, wave: int) -> None:
        self.path, self.wave, self.seed = library, wave, 0
        self.library = ctypes.CDLL(str(library))

    def launch(self, op: str, args: PagesArgs, memory: Memory) -> None:
        self.seed += 1
        self.library.host_launch(op == GATHER, ctypes.byref(args), self.seed)


class Interpreted:
    """Kernels of an interpreter, `ptx` or `cdna`."""

    def __init__(
        self, kernels: dict, launch: Callable[..., None], wave: int, threads: int = BLOCK
    ) -> None:
        self.kernels, self.interpret, self.wave, self.threads = kernels, launch, wave, threads
        self.executed: Counter[str] = Counter()

    def launch(self, op: str, args: PagesArgs, memory: Memory) -> None:
        kernel = self.kernels[op]
        self.interpret(kernel, memory, bytes(args), args.grid, self.threads, self.executed)


def host_library(vendor: str, folder: Path, source: Path, flags: list[str] | None = None) -> Path:
    """The source of a vendor compiled for this machine by g++, which the tests need."""
    library = folder / f"{vendor}-host.so"
    code = {"cuda": native.CUDA_SOURCES[0], "hip": native.HIP_SOURCES[0]}[vendor]
    command = ["g++", *HOST_FLAGS, *(flags or ["-O1"]), "-I", str(source), f"-D{vendor.upper()}"]
    command += [f'-DSOURCE="{code}"', str(Path(__file__).with_name("host.cpp")), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def run_sanitized(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' libraries, for libraries made with SANITIZE."""
    asked = ["g++", "-print-file-name=libasan.so", "-print-file-name=libubsan.so"]
    found = [
        subprocess.run([asked[0], word], capture_output=True, text=True, check=True).stdout.strip()
        for word in asked[1:]
    ]
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env={
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def judge(backend: Backend) -> str | None:
    """The first case in which a backend and the reference differ, or None."""
    for name, case in CASES.items():
        try:
            if not all(map(torch.equal, case(backend), case(TorchBackend()))):
                return name
        except Fault as fault:
            return f"{name}: {fault}"
    return None


def make(name: str, folder: Path, source: Path = ROOT) -> Executor:
    """The executor of that name, from the source in a folder."""
    match name:
        case "cuda-host":
            return Host(host_library("cuda", folder, source), cuda.WAVE)
        case "hip-host":
            return Host(host_library("hip", folder, source), hip.WAVE)
        case _ if name in AMD:
            kernels = cdna.parse(native.hip_assembly(name, source))
            return Interpreted(kernels, cdna.launch, hip.WAVE)
        case _:
            image, _ = native.cuda_image(name, source)
            return Interpreted(ptx.parse(image.decode()), ptx.launch, cuda.WAVE)
