"""NVIDIA's driver API."""

from ctypes import POINTER, byref, c_char_p, c_int, c_void_p
from typing import ClassVar

from lmc.kernels.driver import Driver, mapped_library
from lmc.kernels.images import Vendor

__all__ = ["CudaDriver"]

LIBRARY = "libcuda.so.1"


class CudaDriver(Driver):
    vendor = Vendor.CUDA
    symbols: ClassVar[dict[str, str]] = {
        "init": "cuInit",
        "load": "cuModuleLoadData",
        "function": "cuModuleGetFunction",
        "launch": "cuLaunchKernel",
        "stream": "cuStreamCreate",
        "stream_wait": "cuStreamWaitEvent",
        "stream_end": "cuStreamDestroy_v2",
        "event": "cuEventCreate",
        "event_record": "cuEventRecord",
        "event_query": "cuEventQuery",
        "event_wait": "cuEventSynchronize",
        "event_end": "cuEventDestroy_v2",
        "allocate": "cuMemAlloc_v2",
        "free": "cuMemFree_v2",
        "allocate_host": "cuMemHostAlloc",
        "free_host": "cuMemFreeHost",
        "to_device": "cuMemcpyHtoDAsync_v2",
        "to_host": "cuMemcpyDtoHAsync_v2",
        "pin": "cuMemHostRegister_v2",
        "unpin": "cuMemHostUnregister",
        "device_address": "cuMemHostGetDevicePointer_v2",
    }
    map_flags = 0x1 | 0x2  # PORTABLE, DEVICEMAP

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path or mapped_library("libcuda.so") or LIBRARY)
        self._contexts: dict[int, int] = {}
        self._retain = self.library.cuDevicePrimaryCtxRetain
        self._retain.argtypes, self._retain.restype = [POINTER(c_void_p), c_int], c_int
        self._set_current = self.library.cuCtxSetCurrent
        self._set_current.argtypes, self._set_current.restype = [c_void_p], c_int
        self._texts = [self.library.cuGetErrorName, self.library.cuGetErrorString]
        for call in self._texts:
            call.argtypes, call.restype = [c_int, POINTER(c_char_p)], c_int

    def use(self, device: int) -> None:
        """The primary context: torch's."""
        if device not in self._contexts:
            context = c_void_p()
            self._check_named("cuDevicePrimaryCtxRetain", self._retain(byref(context), device))
            self._contexts[device] = context.value or 0
        self._check_named("cuCtxSetCurrent", self._set_current(self._contexts[device]))

    def error_of(self, status: int) -> tuple[str, str]:
        said = []
        for call in self._texts:
            text = c_char_p()
            call(status, byref(text))
            said.append((text.value or b"unknown").decode())
        return said[0], said[1]
