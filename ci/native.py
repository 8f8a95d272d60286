#!/usr/bin/env python3
"""Compiles all of lmc that is not Python, with two compilers from PyPI: no CUDA, no ROCm, no GPU.

    python ci/native.py [folder]      into folder/lmc, by default beside the source

    ziglang (clang)    lmc/cpu/liblmc_cpu_*.so, lmc/kernels/objects/gfx*.hsaco
    NVRTC              lmc/kernels/objects/sm_*.cubin, and PTX for the NVIDIA GPUs that come later

manifest.json beside the objects says what they were made from and what each kernel takes. The same
source gives the same bytes. Another compiler than pyproject.toml pins, or none, is an error, unless
NATIVE_NVCC or NATIVE_HIPCC names one for that vendor's objects: then the manifest says so, and the
tests call its objects other ones. Prints what the manifest says.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = Path("lmc/kernels/objects")
MANIFEST = OBJECTS / "manifest.json"

CPU_ARCHES = ("x86_64", "aarch64")
CUDA_ARCHES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")
HIP_ARCHES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
HEADERS = ("lmc/kernels/platform.h", "lmc/kernels/pages.h")
CUDA_SOURCES = ("lmc/cuda/pages.cu", "lmc/cuda/device.h", *HEADERS)
HIP_SOURCES = ("lmc/hip/pages.hip", "lmc/hip/device.h", *HEADERS)

GLIBC = "2.17"  # manylinux2014
CPU_FLAGS = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-s"]
# glibc's own memcpy, not the slower one of zig's compiler-rt
CPU_LINK = ["-shared", "-nostdlib", "-lc"]
HIP_FLAGS = [
    *("-x", "hip", "--offload-device-only", "-nogpuinc", "-nogpulib", "-std=c++17", "-O3"),
    *("-Wall", "-Wextra", "-Werror", "-mcode-object-version=5"),
    "-fuse-cuid=none",  # no name made from the folder: same source, same bytes
]
CUDA_FLAGS = ["-std=c++17", "--ptxas-options=-v"]  # -v: registers and spills, in the log

NVRTC = "nvidia-cuda-nvrtc-cu12"
NVCC, HIPCC = "NATIVE_NVCC", "NATIVE_HIPCC"
"""Environment variables: a compiler in place of the pinned one."""

Kernels = dict[str, dict[str, int]]


def build(folder: Path, source: Path = ROOT) -> None:
    """Everything, into `folder`/lmc. Files are replaced whole: a process may be using them."""
    check_compilers()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".native-") as name:
        compile_all(Path(name), source)
        for output in outputs():
            (folder / output).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(name, output), folder / output)


def compile_all(folder: Path, source: Path) -> None:
    for part in (Path("lmc/cpu"), OBJECTS):
        (folder / part).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        libraries = [pool.submit(cpu_library, arch, folder, source) for arch in CPU_ARCHES]
        objects = {arch: pool.submit(cuda_object, arch, folder, source) for arch in CUDA_ARCHES}
        objects |= {arch: pool.submit(hip_object, arch, folder, source) for arch in HIP_ARCHES}
        for library in libraries:
            library.result()
        rows = {arch: row(folder, arch, made.result()) for arch, made in objects.items()}
    manifest = {"source": source_hash(source), "compilers": compilers(), "objects": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def outputs() -> list[str]:
    """All that `build` writes, from its folder."""
    libraries = [f"lmc/cpu/liblmc_cpu_{arch}.so" for arch in CPU_ARCHES]
    objects = [str(OBJECTS / file_of(arch)) for arch in (*CUDA_ARCHES, *HIP_ARCHES)]
    return [*libraries, *objects, str(MANIFEST)]


def file_of(arch: str) -> str:
    suffix = {"sm": "cubin", "compute": "ptx"}.get(arch.split("_")[0], "hsaco")
    return f"{arch}.{suffix}"


def row(folder: Path, arch: str, kernels: Kernels) -> dict[str, object]:
    """An object in the manifest; `kernels` is empty for PTX, which the driver compiles."""
    image = (folder / OBJECTS / file_of(arch)).read_bytes()
    return {
        "file": file_of(arch),
        "vendor": "hip" if arch in HIP_ARCHES else "cuda",
        "bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
        "kernels": kernels,
    }


def source_hash(source: Path = ROOT) -> str:
    digest = hashlib.sha256()
    for name in sorted({*CUDA_SOURCES, *HIP_SOURCES}):
        digest.update(name.encode() + b"\0" + (source / name).read_bytes() + b"\0")
    return digest.hexdigest()


def pins() -> dict[str, str]:
    """The compilers of pyproject.toml: {package: version}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = project["build-system"]["requires"]
    return dict(pin.split("==") for pin in needed if "==" in pin)


def compilers() -> dict[str, str]:
    """What builds: the pins, and in place of NVRTC, or beside zig, what the environment names."""
    found = {name: pin for name, pin in pins().items() if name != NVRTC or not named(NVCC)}
    for variable in (NVCC, HIPCC):
        if command := named(variable):
            found[variable] = run(command, "--version").stdout.strip().splitlines()[-1]
    return found


def named(variable: str) -> str | None:
    return os.environ.get(variable) or None


def check_compilers() -> None:
    for package, version in compilers().items():
        if package in (NVCC, HIPCC):
            continue  # it has just told its version
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != version:
            raise SystemExit(f"the compiler {package} is {found}: pip install {package}=={version}")


def zig(*words: str) -> str:
    """Runs zig; its standard output. What it complains about is in the error."""
    return run(sys.executable, "-m", "ziglang", *words).stdout


def run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"the compiler {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done


def cpu_library(arch: str, folder: Path, source: Path = ROOT) -> None:
    target = f"{arch}-linux-gnu.{GLIBC}"
    library = folder / f"lmc/cpu/liblmc_cpu_{arch}.so"
    code = source / "lmc/cpu/pages.c"
    zig("cc", "-target", target, *CPU_FLAGS, *CPU_LINK, str(code), "-o", str(library))


def hip_object(arch: str, folder: Path, source: Path = ROOT) -> Kernels:
    assembly, image = hip_assembly(arch, source), folder / OBJECTS / file_of(arch)
    if hipcc := named(HIPCC):
        run(hipcc, *hip_flags(arch, source), "--no-gpu-bundle-output", "-o", str(image))
    else:
        assemble(assembly, arch, image)
    return hip_kernels(assembly)


def hip_assembly(arch: str, source: Path = ROOT) -> str:
    words = [*hip_flags(arch, source), "-S", "-o", "-"]
    hipcc = named(HIPCC)
    return run(hipcc, *words).stdout if hipcc else zig("clang", *words)


def hip_flags(arch: str, source: Path) -> list[str]:
    code = source / HIP_SOURCES[0]
    return [*HIP_FLAGS, f"--offload-arch={arch}", "-I", str(source), str(code)]


def assemble(assembly: str, arch: str, image: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        text, linkable = Path(name, f"{arch}.s"), Path(name, f"{arch}.o")
        text.write_text(assembly, encoding="utf-8")
        assembler = ["-cc1as", "-triple", "amdgcn-amd-amdhsa", "-target-cpu", arch]
        zig("clang", *assembler, "-filetype", "obj", str(text), "-o", str(linkable))
        linker = ["ld.lld", "-m", "elf64_amdgpu", "-shared", "--no-undefined"]
        zig(*linker, str(linkable), "-o", str(image))


def hip_kernels(assembly: str) -> Kernels:
    """What each kernel takes, by the metadata in the assembly."""
    found: Kernels = {}
    listed = assembly.partition("amdhsa.kernels:")[2].partition("amdhsa.target:")[0]
    for entry in listed.split("\n  - ")[1:]:
        field = dict(re.findall(r"(\w+): +(\w+)", entry))
        found[field["name"]] = {
            "registers": int(field["vgpr_count"]),
            "spills": int(field["vgpr_spill_count"]) + int(field["sgpr_spill_count"]),
            "stack_bytes": int(field["private_segment_fixed_size"]),
        }
    return dict(sorted(found.items()))


def cuda_object(arch: str, folder: Path, source: Path = ROOT) -> Kernels:
    image, log = cuda_image(arch, source)
    (folder / OBJECTS / file_of(arch)).write_bytes(image)
    return cuda_kernels(log)


def cuda_image(arch: str, source: Path = ROOT) -> tuple[bytes, str]:
    """A cubin (sm_*) or PTX (compute_*), and the compiler's words."""
    if nvcc := named(NVCC):
        return nvcc_image(nvcc, arch, source)
    (file,) = (f for f in metadata.files(NVRTC) or () if f.match("libnvrtc.so*"))
    nvrtc = ctypes.CDLL(str(file.locate()))
    code, *headers = [(source / name).read_bytes() for name in CUDA_SOURCES]
    names = [name.encode() for name in CUDA_SOURCES[1:]]
    options = [f"--gpu-architecture={arch}".encode(), *(flag.encode() for flag in CUDA_FLAGS)]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        code,
        CUDA_SOURCES[0].encode(),
        len(names),
        _strings(headers),
        _strings(names),
    )
    failed = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
    log = _result(nvrtc, "ProgramLog", program).rstrip(b"\0").decode()
    if failed:
        raise SystemExit(f"{CUDA_SOURCES[0]} for {arch}\n{log}")
    if arch.startswith("compute"):
        return _result(nvrtc, "PTX", program).rstrip(b"\0"), log
    return _result(nvrtc, "CUBIN", program), log


def nvcc_image(nvcc: str, arch: str, source: Path) -> tuple[bytes, str]:
    kind = "-ptx" if arch.startswith("compute") else "-cubin"
    code = source / CUDA_SOURCES[0]
    with tempfile.TemporaryDirectory() as name:
        image = Path(name, file_of(arch))
        flags = [*CUDA_FLAGS, kind, f"-arch={arch}", "-I", str(source), str(code)]
        done = run(nvcc, *flags, "-o", str(image))
        return image.read_bytes(), done.stdout + done.stderr


def _strings(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)


def _result(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.raw


def cuda_kernels(log: str) -> Kernels:
    """What each kernel takes, by ptxas -v."""
    kernel = re.compile(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = {
        name: {
            "registers": int(registers),
            "spills": int(stores) + int(loads),
            "stack_bytes": int(stack),
        }
        for name, stack, stores, loads, registers in kernel.findall(log)
    }
    return dict(sorted(found.items()))


def table(manifest: Path) -> str:
    """The objects, and what their kernels take."""
    objects = json.loads(manifest.read_text(encoding="utf-8"))["objects"]
    lines = [f"{'object':<12}{'bytes':>7}  registers, spills, bytes of stack"]
    for arch, made in objects.items():
        taken = [f"{name} {tuple(takes.values())}" for name, takes in made["kernels"].items()]
        lines.append(f"{arch:<12}{made['bytes']:>7}  {' '.join(taken)}".rstrip())
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    build(folder)
    print(table(folder / MANIFEST))


if __name__ == "__main__":
    main()
