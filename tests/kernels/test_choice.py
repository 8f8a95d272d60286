"""Which backend a GPU gets: by what torch says of it and what its driver, a fake one, takes."""

import logging
import sys
from collections.abc import Callable

import pytest
import torch

from lmc.hip import driver as hip_driver
from lmc.kernels import ImageError, Vendor, compile_pages
from lmc.transfer.ops import resolve

Gpu = Callable[[Vendor, str], torch.device]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "lmc")
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed


@pytest.mark.parametrize(
    ("vendor", "arch"), [("cuda", "sm_90"), ("cuda", "sm_103"), ("hip", "gfx942:sramecc+:xnack-")]
)
def test_a_gpu_with_an_image_gets_that(
    gpu: Gpu, vendor: str, arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = gpu(Vendor(vendor), arch)
    assert resolve("auto", device).name == vendor
    assert caplog.messages == [f"lmc transfer backend: {vendor} (the pool is on cuda:0)"]
    other = {"cuda": "hip", "hip": "cuda"}[vendor]
    with pytest.raises(ValueError, match=rf"'{other}' cannot serve this pool: .* on cuda:0"):
        resolve(other, device)


def test_without_triton_a_gpu_without_an_image_gets_torch(
    gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    device = gpu(Vendor.CUDA, "sm_70")
    assert resolve("auto", device).name == "torch"
    [line] = caplog.messages
    assert line.startswith("lmc transfer backend: torch (no cuda image for sm_70, there are sm_75")
    assert "; no Triton: " in line
    with pytest.raises(ValueError, match=r"'triton' cannot serve this pool: no Triton: \S"):
        resolve("triton", device)


def test_without_a_driver_a_gpu_gets_torch_with_one_reason(
    gpu: Gpu, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gpu(Vendor.HIP, "gfx942")
    monkeypatch.setattr(hip_driver, "LIBRARY", "/no/such/libamdhip64.so")
    assert resolve("auto", device).name == "torch"
    [line] = caplog.messages
    assert line.count("/no/such/libamdhip64.so") == 1


def test_without_triton_nothing_is_compiled() -> None:
    with pytest.raises(ImageError, match=r"^no Triton: \S"):
        compile_pages(Vendor.CUDA, "sm_90")
