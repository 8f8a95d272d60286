"""Executors of the kernels and fake drivers, each made once, GPUs that torch seems to see, and what
the tests of a run prove.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ci import native
from lmc.cuda import driver as cuda_driver
from lmc.hip import driver as hip_driver
from lmc.kernels import Vendor, proof
from lmc.kernels.proof import OPS, How

from .executors import Executor, make
from .fake import build_all
from .parity import PROPERTY, Parity


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "write what this run proved to lmc/kernels/proof.json, instead of comparing"
    parser.addoption("--write-parity", action="store_true", help=about)


def pytest_configure(config: pytest.Config) -> None:
    plugin = Parity(config, native.source_hash(), proof.PROOF, "tests/kernels/")
    config.pluginmanager.register(plugin, "parity")


@pytest.fixture
def proves(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`proves(target, how, cases=1, ops=OPS)`: once this test has passed, so many more cases of a
    target's ops are proved in this way.
    """

    def record(target: str, how: How, cases: int = 1, ops: tuple[str, ...] = OPS) -> None:
        properties = request.node.user_properties
        properties.extend((PROPERTY, [target, op, str(how), cases]) for op in ops)

    return record


@pytest.fixture(scope="session")
def executor_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Executor]:
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(lambda name: make(name, folder))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Vendor, Path]:
    """The fake drivers."""
    return build_all(tmp_path_factory.mktemp("drivers"))


@pytest.fixture
def gpu(
    libraries: dict[Vendor, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Vendor, str], torch.device]:
    """A GPU of a vendor that calls itself so, behind a fake driver: what torch would say of it."""

    def seen(vendor: Vendor, arch: str) -> torch.device:
        digits = arch.removeprefix("sm_") if vendor is Vendor.CUDA else "00"
        found = SimpleNamespace(major=digits[:-1], minor=digits[-1], gcnArchName=arch)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        monkeypatch.setattr(torch.version, "hip", "7" if vendor is Vendor.HIP else None)
        module = cuda_driver if vendor is Vendor.CUDA else hip_driver
        monkeypatch.setattr(module, "LIBRARY", str(libraries[vendor]))
        return torch.device("cuda", 0)

    return seen
