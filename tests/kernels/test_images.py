"""The objects are those of this source, build again to the same bytes, and are chosen by name."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ci import native
from lmc.kernels import ImageError, PagesArgs, Vendor, check, choose, listed, load
from lmc.kernels.images import describe
from lmc.kernels.proof import How

from .executors import AMD, ROOT

ARCHES = (*native.CUDA_ARCHES, *native.HIP_ARCHES)
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
MANIFEST = json.loads((ROOT / native.MANIFEST).read_text(encoding="utf-8"))


def test_the_objects_are_those_of_this_source() -> None:
    assert MANIFEST["source"] == native.source_hash(), "run: python ci/native.py"
    assert MANIFEST["compilers"] == native.pins()
    assert tuple(MANIFEST["objects"]) == ARCHES


def test_another_build_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    began = time.monotonic()
    native.build(tmp_path)
    assert time.monotonic() - began < 120
    for name in native.outputs():
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


@pytest.mark.parametrize("arch", AMD)
def test_the_assembly_that_is_executed_is_that_of_the_object(arch: str, tmp_path: Path) -> None:
    native.assemble(native.hip_assembly(arch), arch, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == load(choose(Vendor.HIP, arch))


def test_the_ptx_that_is_executed_is_that_which_ships() -> None:
    assert native.cuda_image("compute_80")[0] == load(listed()["compute_80"])


@pytest.mark.parametrize("arch", ARCHES)
def test_every_image_says_what_it_is_for(arch: str) -> None:
    image = listed()[arch]
    assert describe(load(image)) == f"{image.vendor} {arch}"
    for other in listed().values():
        if other.arch != arch:
            with pytest.raises(ImageError, match=f"for {other.vendor} {other.arch} is wanted"):
                check(load(image), other.vendor, other.arch)


@pytest.mark.parametrize("arch", ARCHES)
def test_every_image_holds_both_kernels(arch: str, proves: Callable[..., None]) -> None:
    data = load(listed()[arch])
    assert b"lmc_gather" in data
    assert b"lmc_scatter" in data
    proves(arch, How.COMPILED)


@pytest.mark.parametrize("arch", native.CPU_ARCHES)
def test_every_library_is_for_its_processor(arch: str, proves: Callable[..., None]) -> None:
    data = (ROOT / f"lmc/cpu/liblmc_cpu_{arch}.so").read_bytes()
    assert describe(data) == f"ELF machine {ELF_MACHINES[arch]}"
    assert b"\0lmc_gather\0" in data
    assert b"\0lmc_scatter\0" in data
    proves(f"cpu {arch}", How.COMPILED)


def test_the_argument_is_as_large_as_the_kernels_say() -> None:
    size = len(bytes(PagesArgs()))
    for arch in native.HIP_ARCHES:
        assert native.hip_assembly(arch).count(f".kernarg_segment_size: {size}\n") == 2
    assert load(listed()["compute_80"]).count(f"_param_0[{size}]".encode()) == 2


@pytest.mark.parametrize(
    ("vendor", "arch", "chosen"),
    [
        (Vendor.CUDA, "sm_90", "sm_90"),
        (Vendor.CUDA, "sm_75", "sm_75"),
        (Vendor.CUDA, "sm_87", "compute_80"),
        (Vendor.CUDA, "sm_103", "compute_80"),
        (Vendor.HIP, "gfx942", "gfx942"),
        (Vendor.HIP, "gfx90a:sramecc+:xnack-", "gfx90a"),
    ],
)
def test_the_exact_image_or_ptx_is_chosen(vendor: Vendor, arch: str, chosen: str) -> None:
    assert choose(vendor, arch) == listed()[chosen]


@pytest.mark.parametrize(
    ("vendor", "arch"),
    [
        (Vendor.CUDA, "sm_70"),
        (Vendor.CUDA, "gfx942"),
        (Vendor.CUDA, "compute_100"),
        (Vendor.HIP, "gfx906"),
        (Vendor.HIP, "sm_90"),
        (Vendor.HIP, "compute_80"),
    ],
)
def test_a_gpu_that_nothing_serves_is_refused_by_name(vendor: Vendor, arch: str) -> None:
    with pytest.raises(ImageError, match=f"no {vendor} image for {arch}, there are "):
        choose(vendor, arch)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no GPU"),
        (b"\x7fELF", "no GPU"),
        (b"text", "no GPU"),
        (b"\x7fELF" + bytes(60), "ELF machine 0"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, found: str) -> None:
    with pytest.raises(ImageError, match=f"this one is for {found}"):
        check(data, Vendor.CUDA, "sm_90")


def test_changed_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.kernels.images.OBJECTS", tmp_path)
    image = listed()["sm_90"]
    (tmp_path / image.file).write_bytes(b"changed")
    with pytest.raises(ImageError, match=r"sm_90.cubin is not the file that was built"):
        load(image)


def test_without_objects_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.kernels.images.OBJECTS", tmp_path)
    with pytest.raises(ImageError, match=r"no GPU objects were built: .*manifest.json is missing"):
        listed.__wrapped__()


@pytest.mark.parametrize("package", native.pins())
def test_a_missing_compiler_is_an_error_that_names_it(package: str) -> None:
    hide = f"""
import importlib.metadata as metadata
from ci import native
real = metadata.version
def version(name):
    if name == {package!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
native.build(native.Path("/nowhere"))
"""
    command = [sys.executable, "-c", hide]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    wanted = f"{package}=={native.pins()[package]}"
    assert f"the compiler {package} is not installed: pip install {wanted}" in done.stderr


FAKE_COMPILER = """#!/bin/sh
for word; do last=$word; done
case "$*" in
    --version) echo "a fake compiler"; echo "release 1.2"; exit ;;
    *" -S "*) cat {assembly} ;;
    *) cp {image} "$last" ;;
esac
echo "$@" >> {log}
cat {words} >&2
"""


def test_nvcc_and_hipcc_build_where_the_environment_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake ones, which say what they were told."""
    assembly, words, log = (tmp_path / name for name in ("assembly", "words", "log"))
    assembly.write_text(native.hip_assembly("gfx942"))
    words.write_text(native.cuda_image("sm_90")[1])
    for variable, image in ((native.NVCC, "sm_90.cubin"), (native.HIPCC, "gfx942.hsaco")):
        compiler = tmp_path / variable
        files = {"assembly": assembly, "words": words, "log": log}
        files["image"] = ROOT / native.OBJECTS / image
        compiler.write_text(FAKE_COMPILER.format(**files))
        compiler.chmod(0o755)
        monkeypatch.setenv(variable, str(compiler))
    native.build(tmp_path / "out")
    made = json.loads((tmp_path / "out" / native.MANIFEST).read_text(encoding="utf-8"))
    assert made["compilers"] == {
        "ziglang": native.pins()["ziglang"],
        native.NVCC: "release 1.2",
        native.HIPCC: "release 1.2",
    }
    for arch in ("sm_90", "gfx942"):
        assert made["objects"][arch] == MANIFEST["objects"][arch]
    told = sorted(log.read_text().splitlines())
    assert len(told) == len(native.CUDA_ARCHES) + 2 * len(native.HIP_ARCHES)
    assert sum(f"-cubin -arch={arch} " in line for line in told for arch in ARCHES) == 7
    assert sum("-ptx -arch=compute_80 " in line for line in told) == 1
    assert sum("--offload-arch=gfx950 " in line for line in told) == 2
    assert all(f"-I {ROOT} {ROOT}/lmc/" in line for line in told)


@pytest.mark.parametrize("variable", [native.NVCC, native.HIPCC])
def test_a_named_compiler_that_cannot_be_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(SystemExit, match="the compiler no-such-compiler cannot be run: No such"):
        native.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_environment_has_the_pinned_compilers() -> None:
    for file in ("dev", "sglang", "vllm"):
        listed = (ROOT / f"ci/requirements/{file}.txt").read_text(encoding="utf-8").splitlines()
        assert {f"{package}=={version}" for package, version in native.pins().items()} <= {*listed}


def test_source_that_does_not_compile_is_an_error_with_the_compilers_words(tmp_path: Path) -> None:
    for name in {*native.CUDA_SOURCES, *native.HIP_SOURCES}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(
            text.replace("lmc_advance(a, at, step)", "no_such_function(a)")
        )
    with pytest.raises(SystemExit, match="no_such_function"):
        native.cuda_image("sm_90", tmp_path)
    with pytest.raises(SystemExit, match="no_such_function"):
        native.hip_assembly("gfx942", tmp_path)
