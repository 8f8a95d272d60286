"""AMD's HIP runtime, which is its driver API as well."""

from ctypes import c_char_p, c_int
from typing import ClassVar

from lmc.kernels.driver import Driver, mapped_library
from lmc.kernels.images import Vendor

__all__ = ["HipDriver"]

LIBRARY = "libamdhip64.so"


class HipDriver(Driver):
    vendor = Vendor.HIP
    symbols: ClassVar[dict[str, str]] = {
        "init": "hipInit",
        "load": "hipModuleLoadData",
        "function": "hipModuleGetFunction",
        "launch": "hipModuleLaunchKernel",
        "stream": "hipStreamCreateWithFlags",
        "stream_wait": "hipStreamWaitEvent",
        "stream_end": "hipStreamDestroy",
        "event": "hipEventCreateWithFlags",
        "event_record": "hipEventRecord",
        "event_query": "hipEventQuery",
        "event_wait": "hipEventSynchronize",
        "event_end": "hipEventDestroy",
        "allocate": "hipMalloc",
        "free": "hipFree",
        "allocate_host": "hipHostMalloc",
        "free_host": "hipHostFree",
        "to_device": "hipMemcpyHtoDAsync",
        "to_host": "hipMemcpyDtoHAsync",
        "pin": "hipHostRegister",
        "unpin": "hipHostUnregister",
        "device_address": "hipHostGetDevicePointer",
        "pci_address": "hipDeviceGetPCIBusId",
    }
    map_flags = 0x1 | 0x2  # portable, mapped: the same bits for hipHostMalloc and hipHostRegister

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path or mapped_library(LIBRARY) or LIBRARY)
        self._set_device = self.library.hipSetDevice
        self._set_device.argtypes, self._set_device.restype = [c_int], c_int
        self._texts = [self.library.hipGetErrorName, self.library.hipGetErrorString]
        for call in self._texts:
            call.argtypes, call.restype = [c_int], c_char_p

    def use(self, device: int) -> None:
        self._check_named("hipSetDevice", self._set_device(device))

    def error_of(self, status: int) -> tuple[str, str]:
        name, message = ((call(status) or b"unknown").decode() for call in self._texts)
        return name, message
