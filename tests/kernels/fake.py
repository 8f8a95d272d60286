"""The fake drivers (fake_driver.cpp): built, loaded, told what to do wrong."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ci import native
from lmc import cuda, hip
from lmc.cuda.driver import CudaDriver
from lmc.hip.driver import HipDriver
from lmc.kernels import Compiled, Vendor, listed, load
from lmc.transfer.gpu import GpuBackend
from lmc.transfer.pages import PagedPool

VENDORS = {
    Vendor.CUDA: (CudaDriver, cuda.POLICY, "sm_90"),
    Vendor.HIP: (HipDriver, hip.POLICY, "gfx942"),
}


class Fake:
    """A vendor's fake driver: set what it does wrong, ask what it did."""

    def __init__(self, vendor: Vendor, library: Path) -> None:
        self.vendor = vendor
        self.library = ctypes.CDLL(str(library))
        self.library.fake_count.restype = self.library.fake_left.restype = ctypes.c_int64
        self.library.fake_reset()
        make, self.policy, arch = VENDORS[vendor]
        self.driver = make(str(library))
        self.image = load(listed()[arch])

    def set(self, name: str, value: int) -> None:
        self.library.fake_set(name.encode(), ctypes.c_int64(value))

    def count(self, name: str) -> int:
        return self.library.fake_count(name.encode())

    @property
    def left(self) -> int:
        """Streams, events, memory and pins that nobody gave back."""
        return self.library.fake_left()

    @contextmanager
    def owns(self, pool: PagedPool) -> Iterator[None]:
        """The pool lies in the device's memory."""
        for plane in pool.planes:
            size = (pool.num_pages - 1) * plane.stride(0) + plane.shape[1]
            self.library.fake_own(ctypes.c_void_p(plane.data_ptr()), ctypes.c_size_t(size))
        yield
        for plane in pool.planes:
            self.library.fake_disown(ctypes.c_void_p(plane.data_ptr()))

    def backend(self, image: Compiled | None = None, **policy: object) -> GpuBackend:
        policy = {"grid": 3, "staging_bytes": 1 << 20, "batch_from": None, **policy}
        return GpuBackend(self.driver, image or self.image, replace(self.policy, **policy))


def build(vendor: Vendor, folder: Path) -> Path:
    library = folder / f"{vendor}-driver.so"
    code = {Vendor.CUDA: native.CUDA_SOURCES[0], Vendor.HIP: native.HIP_SOURCES[0]}[vendor]
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-attributes"]
    command += ["-Wno-unknown-pragmas", "-I", str(native.ROOT), f"-D{vendor.upper()}"]
    command += [f'-DSOURCE="{code}"', str(Path(__file__).with_name("fake_driver.cpp"))]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def build_all(folder: Path) -> dict[Vendor, Path]:
    return {vendor: build(vendor, folder) for vendor in VENDORS}
