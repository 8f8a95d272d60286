"""Builds what is not Python, by ci/native.py: the CPU library and the GPUs' objects.

Everything else is in pyproject.toml. The wheel holds them as data and no Python extension, so one
file serves every Python, both processors and both vendors of GPUs:
py3-none-manylinux2014_{x86_64,aarch64}.
"""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from ci import native  # noqa: E402


class BuildWithNative(build_py):
    """Python files, then the rest: in the build folder, or beside the source if editable."""

    def run(self) -> None:
        super().run()
        native.build(self._folder())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = [str(self._folder() / name) for name in native.outputs()]
        return [*super().get_outputs(include_bytecode), *made]

    def _folder(self) -> Path:
        return ROOT if self.editable_mode else Path(self.build_lib)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # the CPU library: the wheel is not for any platform


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", ".".join(f"manylinux2014_{arch}" for arch in native.CPU_ARCHES)


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel},
)
