"""Builds the native CPU library for both architectures with the compiler in PyPI's `ziglang`.

Everything else is in pyproject.toml. The wheel holds both libraries and no Python extension, so one
file serves every Python and both architectures: py3-none-manylinux2014_{x86_64,aarch64}.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ARCHES = ("x86_64", "aarch64")
GLIBC = "2.17"  # manylinux2014
SOURCE = Path("lmc/cpu/pages.c")
FLAGS = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-s"]
# glibc's own memcpy, not the slower one of zig's compiler-rt
LINK = ["-shared", "-nostdlib", "-lc"]


def compile_library(arch: str, folder: Path) -> Path:
    library = folder / f"liblmc_cpu_{arch}.so"
    target = f"{arch}-linux-gnu.{GLIBC}"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target]
    subprocess.run([*compiler, *FLAGS, *LINK, str(SOURCE), "-o", str(library)], check=True)
    return library


class BuildWithLibrary(build_py):
    """Python files, then the libraries: in the build folder, or beside the source if editable."""

    def run(self) -> None:
        super().run()
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        for arch in ARCHES:
            compile_library(arch, folder)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        libraries = [str(self._folder() / f"liblmc_cpu_{arch}.so") for arch in ARCHES]
        return [*super().get_outputs(include_bytecode), *libraries]

    def _folder(self) -> Path:
        return SOURCE.parent if self.editable_mode else Path(self.build_lib) / SOURCE.parent


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # the libraries: the wheel is not for any platform


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", ".".join(f"manylinux2014_{arch}" for arch in ARCHES)


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
)
