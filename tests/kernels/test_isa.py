"""What the compilers made of the kernels, for every object: registers, spills, wide words."""

import json
import re
import subprocess
from collections.abc import Callable
from importlib import metadata

import pytest

from ci import native
from lmc.kernels.proof import How

from .executors import ROOT

OBJECTS = json.loads((ROOT / native.MANIFEST).read_text(encoding="utf-8"))["objects"]
KERNELS = ("lmc_gather", "lmc_scatter")
SASS = tuple(arch for arch in native.CUDA_ARCHES if arch.startswith("sm_"))
UNROLL = 4  # LMC_UNROLL of platform.h
MAX_REGISTERS = 64
"""So that four blocks fit where registers are fewest: 65536 of 32 bits."""


@pytest.mark.parametrize("arch", [*SASS, *native.HIP_ARCHES])
def test_no_spill_and_no_stack(arch: str, proves: Callable[..., None]) -> None:
    kernels = OBJECTS[arch]["kernels"]
    assert tuple(kernels) == KERNELS
    for takes in kernels.values():
        assert takes["spills"] == takes["stack_bytes"] == 0
        assert 0 < takes["registers"] <= MAX_REGISTERS
    proves(arch, How.ISA)


def sass(arch: str) -> dict[str, list[str]]:
    """The memory instructions of each kernel: LDG.E.EF.128."""
    (tool,) = (f for f in metadata.files("nvidia-cuda-nvdisasm") or () if f.name == "nvdisasm")
    image = ROOT / native.OBJECTS / f"{arch}.cubin"
    command = [str(tool.locate()), "-c", str(image)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    bodies = dict(zip(sections[::2], sections[1::2], strict=True))
    memory = r"\b(?:LD|ST|ATOM|RED)[A-Z]*(?:\.\w+)*(?= )"
    return {name: re.findall(memory, body) for name, body in bodies.items()}


def gcn(arch: str) -> dict[str, list[str]]:
    """The memory instructions of each kernel, RDNA's names as CDNA's: global_load_dwordx4 nt."""
    text = native.hip_assembly(arch)
    assert not re.search(r"\bhidden_", text)
    bodies = dict(re.findall(r"^(lmc_\w+):(.*?)^\.Lfunc_end", text, re.DOTALL | re.MULTILINE))
    return {name: _gcn_memory(body) for name, body in bodies.items()}


def _gcn_memory(body: str) -> list[str]:
    lines = re.findall(r"^\t(?:global|flat|scratch|buffer|ds)_.*", body, re.MULTILINE)
    hinted = re.compile(r" (nt|glc slc|slc dlc|th:TH_(LOAD|STORE)_NT)$")
    found = []
    for line in (line.strip() for line in lines):
        name = line.split()[0].replace("_b128", "_dwordx4")
        found.append(f"{name} nt" if hinted.search(line) else name)
    return found


@pytest.mark.parametrize("arch", SASS)
def test_nvidia_loads_and_stores_16_bytes_at_once(arch: str, proves: Callable[..., None]) -> None:
    found = sass(arch)
    assert tuple(sorted(found)) == KERNELS
    for ops in found.values():
        assert {op.split(".")[0] for op in ops} <= {"LDG", "STG", "LDC", "LDCU"}
    assert wide(found["lmc_gather"]) == ["LDG"] * UNROLL + ["STG streamed"] * UNROLL
    assert wide(found["lmc_scatter"]) == ["LDG streamed"] * UNROLL + ["STG"] * UNROLL
    proves(arch, How.ISA)


def wide(ops: list[str]) -> list[str]:
    """16-byte accesses; all loads of a round must stand before its stores."""
    return [op.split(".")[0] + (" streamed" if ".EF" in op else "") for op in ops if ".128" in op]


@pytest.mark.parametrize("arch", native.HIP_ARCHES)
def test_amd_loads_and_stores_16_bytes_at_once(arch: str, proves: Callable[..., None]) -> None:
    found = gcn(arch)
    assert tuple(found) == KERNELS
    for ops in found.values():
        assert {op.split("_")[0] for op in ops} == {"global"}
    load, store = "global_load_dwordx4", "global_store_dwordx4"
    for kernel, loads, stores in (
        ("lmc_gather", load, f"{store} nt"),
        ("lmc_scatter", f"{load} nt", store),
    ):
        ops = [op for op in found[kernel] if "dwordx4" in op]
        assert ops[-2 * UNROLL :] == [loads] * UNROLL + [stores] * UNROLL
        assert set(ops[: -2 * UNROLL]) <= {load}  # a row of a table
    proves(arch, How.ISA)
