"""NVIDIA's driver API."""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any, ClassVar

from lmc.kernels.driver import Driver, mapped_library
from lmc.kernels.images import Vendor

__all__ = ["CudaDriver"]

LIBRARY = "libcuda.so.1"
BATCH_CALLS = {"cuMemcpyBatchAsync_v2": False, "cuMemcpyBatchAsync": True}
"""Since 13.0, and since 12.8, which wants a place for the index of what failed."""
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Place(ctypes.Structure):
    """CUmemLocation: a hint that is for managed memory alone."""

    _fields_ = (("type", c_int), ("id", c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (("order", c_int), ("source", _Place), ("to", _Place), ("flags", c_uint))


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
        "pci_address": "cuDeviceGetPCIBusId",
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
        self._batch_name, self._batch = self._find_batch()
        self.batches = self._batch is not None

    def _find_batch(self) -> tuple[str, Any]:
        for name, has_index in BATCH_CALLS.items():
            call = getattr(self.library, name, None)
            if call is not None:
                pieces = [c_void_p, c_void_p, c_void_p, c_size_t]
                attributes = [POINTER(_Attributes), POINTER(c_size_t), c_size_t]
                index = [POINTER(c_size_t)] if has_index else []
                call.argtypes, call.restype = [*pieces, *attributes, *index, c_void_p], c_int
                return name, call
        return "", None

    def use(self, device: int) -> None:
        """The primary context: torch's."""
        if device not in self._contexts:
            context = c_void_p()
            self._check_named("cuDevicePrimaryCtxRetain", self._retain(byref(context), device))
            self._contexts[device] = context.value or 0
        self._check_named("cuCtxSetCurrent", self._set_current(self._contexts[device]))

    def batch(self, to: int, source: int, sizes: int, count: int, stream: int) -> None:
        attributes, first = _Attributes(order=_STREAM_ORDER), c_size_t(0)
        failed = [byref(c_size_t())] if BATCH_CALLS[self._batch_name] else []
        pieces = (to, source, sizes, count)
        status = self._batch(*pieces, byref(attributes), byref(first), 1, *failed, stream)
        self._check_named(self._batch_name, status)

    def error_of(self, status: int) -> tuple[str, str]:
        said = []
        for call in self._texts:
            text = c_char_p()
            call(status, byref(text))
            said.append((text.value or b"unknown").decode())
        return said[0], said[1]
