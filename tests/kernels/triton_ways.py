"""Ways to run the Triton kernels without a GPU; importing this needs Triton.

triton                            Triton's own interpreter, program by program
triton sm_90                      the PTX that Triton makes
triton gfx90a, gfx942, gfx950     the assembly that Triton makes
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from lmc import kernels as package
from lmc.kernels import Compiled, PagesArgs, Vendor, compile_pages
from lmc.transfer.reference import host_view

from . import cdna, ptx
from .executors import ROOT, Executor, Interpreted
from .memory import Memory

NAME = "lmc/kernels/pages_triton.py"
COMPILED = ("triton sm_90", "triton gfx90a", "triton gfx942", "triton gfx950")
WAYS = ("triton", *COMPILED)


def kernels_of(source: Path, *, interpret: bool) -> ModuleType:
    """The kernels in a folder's source, for Triton's interpreter or for its compiler."""
    spec = importlib.util.spec_from_file_location("lmc.kernels.pages_triton", source / NAME)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        spec.loader.exec_module(module)
    return module


def compiled(arch: str, source: Path = ROOT) -> Compiled:
    """What `compile_pages` makes of a folder's source."""
    with pytest.MonkeyPatch.context() as patched:
        kernels = kernels_of(source, interpret=False)
        patched.setattr(package, "pages_triton", kernels, raising=False)
        return compile_pages(Vendor.CUDA if arch.startswith("sm_") else Vendor.HIP, arch)


class Checked:
    """Loads and stores of Triton's interpreter, kept to the memory they may touch."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def load(
        self, addresses: np.ndarray, on: np.ndarray, other: np.ndarray, dtype: np.dtype
    ) -> np.ndarray:
        loaded = np.array(other, dtype)
        data = self.memory.load(addresses[on].astype(np.uint64), loaded.itemsize)
        loaded[on] = data.view(dtype)[:, 0]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray, on: np.ndarray) -> None:
        data = np.ascontiguousarray(values[on])
        rows = data.view(np.uint8).reshape(len(data), data.itemsize)
        self.memory.store(addresses[on].astype(np.uint64), rows)


class Programs:
    """Triton's own interpreter."""

    wave = 32  # Triton's business

    def __init__(self, source: Path = ROOT) -> None:
        self.kernels = kernels_of(source, interpret=True)

    def launch(self, op: str, args: PagesArgs, memory: Memory) -> None:
        values = [
            host_view(value, 8).view(torch.int64) if field.size == 8 else value
            for field, value in (
                (getattr(PagesArgs, name), getattr(args, name)) for name, _ in PagesArgs._fields_
            )
        ]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(interpreter, "_interpreter", Checked(memory))
            try:
                getattr(self.kernels, op)[(args.grid,)](*values)
            except interpreter.InterpreterError as error:
                raise first(error) from None


def first(error: BaseException) -> BaseException:
    """What went wrong before Triton's interpreter put its own around it, once a call."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__:
        error = error.__cause__
    return error


class Split(Interpreted):
    """Each field of the arguments is a parameter; the pointers to scratch memory follow."""

    def launch(self, op: str, args: PagesArgs, memory: Memory) -> None:
        given = bytes(args) + bytes(16)
        self.interpret(self.kernels[op], memory, given, args.grid, self.threads, self.executed)


def make(way: str, source: Path = ROOT) -> Executor:
    if way == "triton":
        return Programs(source)
    made = compiled(way.split()[1], source)
    executor = ptx if "sm_" in way else cdna
    kernels = {op: executor.parse(text)[op] for op, text in made.assembly.items()}
    return Split(kernels, executor.launch, made.threads, made.threads)
