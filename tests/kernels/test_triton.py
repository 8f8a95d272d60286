"""The Triton kernels move what the torch reference moves, under Triton's interpreter and as what it
compiles; what it compiles for every GPU; launches of it. Triton is in the SGLang environment.
"""

import functools
import logging
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here: ci/test.sh has SGLang's")

from triton.backends.nvidia.compiler import get_ptxas

from lmc.kernels import Compiled, ImageError, Vendor, compile_pages
from lmc.kernels.proof import How
from lmc.transfer.ops import resolve
from lmc.transfer.reference import TorchBackend

from .cases import CASES
from .executors import Executor, Interpreted, KernelBackend
from .fake import Fake
from .memory import Fault
from .test_driver import WAYS as REACHES
from .test_driver import Pinned
from .test_kernels import stray_transfer
from .triton_ways import COMPILED, WAYS, compiled, make

NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1200", "gfx1201")
MAX_REGISTERS = 128
"""As many as leave every GPU four waves where it has the fewest: 512 for each."""

Made = Callable[[str], Executor]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that Triton made before is found again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="session")
def made(cache: None) -> Made:
    return functools.cache(make)


@pytest.fixture(scope="session")
def compiled_for(cache: None) -> Callable[[str], Compiled]:
    return functools.cache(compiled)


# --- bytes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_moves_what_the_reference_moves(
    way: str, case: str, made: Made, proves: Callable[..., None]
) -> None:
    got, want = map(CASES[case], (KernelBackend(made(way)), TorchBackend()))
    assert all(map(torch.equal, got, want))
    proves(way, How.INTERPRETED)


@pytest.mark.parametrize("grid", [1, 7, 64])
@pytest.mark.parametrize("way", ["triton", "triton sm_90"])
def test_any_grid_will_do(way: str, grid: int, made: Made) -> None:
    for case in ("mla and its indexer", "odd rows", "recurrent states", "many short pieces"):
        got, want = map(CASES[case], (KernelBackend(made(way), grid), TorchBackend()))
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("way", COMPILED)
def test_words_of_all_widths_were_moved(way: str, made: Made) -> None:
    executor = made(way)
    assert isinstance(executor, Interpreted)
    executor.executed.clear()
    for case in ("rows of 8", "rows of 4", "odd rows", "mla fp8"):
        CASES[case](KernelBackend(executor))
    stores = {f"st.global.{width}" for width in ("b8", "b32", "b64", "v4.b32")}
    if "gfx" in way:
        stores = {f"global_store_{width}" for width in ("byte", "dword", "dwordx2", "dwordx4")}
    assert stores <= executor.executed.keys()


@pytest.mark.parametrize("way", WAYS)
def test_a_read_outside_the_pool_is_seen(way: str, made: Made) -> None:
    with pytest.raises(Fault, match="outside of every buffer"):
        KernelBackend(made(way)).gather(stray_transfer(), range(1))


# --- what Triton compiles


@pytest.mark.parametrize("arch", NVIDIA)
def test_nvidia_loads_and_stores_16_bytes_at_once_without_a_spill(
    arch: str,
    compiled_for: Callable[[str], Compiled],
    tmp_path: Path,
    proves: Callable[..., None],
) -> None:
    found = compiled_for(arch)
    assert found.threads == 32
    for op, text in found.assembly.items():
        assert f".entry {op}(" in text
        widths = re.findall(r"\b((?:ld|st)\.global[.\w]*\.v4\.b32)\b", text)
        assert widths == ["ld.global.v4.b32"] * 8 + ["st.global.v4.b32"] * 8  # a slice at once
        assert not re.search(r"\.(local|shared)\b|\bld\.b|\bst\.b", text)
        assert re.search(r"^\.target (sm_\d+)", text, re.MULTILINE)[1] == arch
        takes = assembled(text, tmp_path / op)
        assert takes["spill stores"] == takes["spill loads"] == takes["stack frame"] == 0
        assert 0 < takes["registers"] <= MAX_REGISTERS
    proves(f"triton {arch}", How.ISA)


def assembled(text: str, place: Path) -> dict[str, int]:
    """What NVIDIA's assembler says of PTX."""
    place.write_text(text)
    target = re.search(r"^\.target (sm_\w+)", text, re.MULTILINE)[1]
    tool = get_ptxas(int(re.search(r"\d+", target)[0])).path
    command = [tool, "-v", f"--gpu-name={target}", str(place), "-o", f"{place}.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = r"(\d+) (?:bytes )?(stack frame|spill stores|spill loads|registers)"
    return {name: int(count) for count, name in re.findall(pattern, said)}


@pytest.mark.parametrize("arch", AMD)
def test_amd_loads_and_stores_16_bytes_at_once_without_a_spill(
    arch: str, compiled_for: Callable[[str], Compiled], proves: Callable[..., None]
) -> None:
    found = compiled_for(arch)
    cdna = arch.startswith("gfx9")
    assert found.threads == (64 if cdna else 32)
    for op, text in found.assembly.items():
        facts = dict(re.findall(r"^ +\.(\w+): +(\w+)$", text, re.MULTILINE))
        spare = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        assert [facts[name] for name in (*spare, "group_segment_fixed_size")] == ["0"] * 4
        assert 0 < int(facts["vgpr_count"]) <= MAX_REGISTERS
        assert (facts["name"], facts["kernarg_segment_size"]) == (op, "88")
        assert "hidden_" not in text
        ops = re.findall(r"^\t((?:global|flat|scratch|buffer|ds)_(?:load|store)\w*)", text, re.M)
        assert {name.split("_")[0] for name in ops} == {"global"}
        moved = [name.replace("b128", "dwordx4") for name in ops]
        rounds = 4096 // 16 // found.threads
        assert moved.count("global_store_dwordx4") == rounds
        assert moved.count("global_load_dwordx4") >= rounds  # a row of a table as well
    proves(f"triton {arch}", How.ISA)


@pytest.mark.parametrize(("vendor", "arch"), [("hip", "gfx000"), ("cuda", "sm_1"), ("cuda", "x")])
def test_a_gpu_that_triton_does_not_know_is_refused_by_name(vendor: str, arch: str) -> None:
    with pytest.raises(ImageError, match=rf"^Triton \d.* has none for {arch}: \S"):
        compile_pages(Vendor(vendor), arch)


# --- launches


@pytest.fixture(params=[(Vendor.CUDA, "sm_90"), (Vendor.HIP, "gfx1151")], ids=lambda gpu: gpu[1])
def split(
    request: pytest.FixtureRequest,
    libraries: dict[Vendor, Path],
    compiled_for: Callable[[str], Compiled],
) -> tuple[Fake, Compiled]:
    """A driver that takes each field of the arguments as a parameter, and kernels like that."""
    vendor, arch = request.param
    fake = Fake(vendor, libraries[vendor])
    image = compiled_for(arch)
    fake.set("split", image.threads)
    return fake, image


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reach", ["reaching", "staged"])
def test_every_case_is_launched(split: tuple[Fake, Compiled], reach: str, case: str) -> None:
    fake, image = split
    policy, _ = REACHES[reach]
    backend = fake.backend(image, **policy)
    assert backend.name == "triton"
    got, want = CASES[case](Pinned(backend)), CASES[case](TorchBackend())
    assert all(map(torch.equal, got, want))
    backend.close()
    assert fake.left == 0


def test_a_gpu_without_an_image_gets_them_with_one_line(
    gpu: Callable[[Vendor, str], torch.device], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmc")
    device = gpu(Vendor.HIP, "gfx1151")
    assert resolve("auto", device).name == "triton"
    assert resolve("triton", gpu(Vendor.CUDA, "sm_90")).name == "triton"
    first, second = caplog.messages
    served = "there are gfx90a, gfx942, gfx950, gfx1100, gfx1201"
    assert first == f"lmc transfer backend: triton (no hip image for gfx1151, {served})"
    assert second == "lmc transfer backend: triton (asked for)"


def test_a_gpu_that_nothing_is_for_gets_torch(
    gpu: Callable[[Vendor, str], torch.device], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmc")
    assert resolve("auto", gpu(Vendor.HIP, "gfx000")).name == "torch"
    [line] = caplog.messages
    assert re.search(r"torch \(no hip image for gfx000, .*; Triton .* has none for gfx000: ", line)
