"""A vendor's driver library behind ctypes: what both have in common. How each names its calls
stands in its folder (`lmc.cuda.driver`, `lmc.hip.driver`).

What a driver answers other than success is a DriverError with the driver's own name and message for
it. Handles and addresses are plain integers; stream 0 is the default one. A thread calls `use`
before anything else.
"""

import abc
import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import ClassVar, NamedTuple

from lmc.kernels.args import BLOCK, GATHER, SCATTER, PagesArgs
from lmc.kernels.images import Vendor
from lmc.kernels.jit import Compiled

__all__ = ["BATCH_PIECES", "Driver", "DriverError", "Kernels", "mapped_library"]

_HANDLE = POINTER(c_void_p)
_ARGUMENTS = {
    "init": [c_uint],
    "load": [_HANDLE, c_char_p],
    "function": [_HANDLE, c_void_p, c_char_p],
    "launch": [c_void_p, *[c_uint] * 7, c_void_p, _HANDLE, _HANDLE],
    "stream": [_HANDLE, c_uint],
    "stream_wait": [c_void_p, c_void_p, c_uint],
    "stream_end": [c_void_p],
    "event": [_HANDLE, c_uint],
    "event_record": [c_void_p, c_void_p],
    "event_query": [c_void_p],
    "event_wait": [c_void_p],
    "event_end": [c_void_p],
    "allocate": [_HANDLE, c_size_t],
    "free": [c_void_p],
    "allocate_host": [_HANDLE, c_size_t, c_uint],
    "free_host": [c_void_p],
    "to_device": [c_void_p, c_void_p, c_size_t, c_void_p],
    "to_host": [c_void_p, c_void_p, c_size_t, c_void_p],
    "pin": [c_void_p, c_size_t, c_uint],
    "unpin": [c_void_p],
    "device_address": [_HANDLE, c_void_p, c_uint],
    "pci_address": [c_char_p, c_int, c_int],
}
"""Calls that take the same arguments on both sides; all of them answer with a status."""

BATCH_PIECES = 8192

_NO_SCRATCH = c_void_p()
_NOT_READY = 600  # CUDA_ERROR_NOT_READY, hipErrorNotReady
_STREAM_NON_BLOCKING = 1
_EVENT_NO_TIMING = 2


class DriverError(RuntimeError):
    """A call the driver did not do."""

    def __init__(self, call: str, status: int, name: str, message: str) -> None:
        super().__init__(f"{call}: {name} ({status}), {message}")
        self.call, self.status, self.name = call, status, name


class Kernels(NamedTuple):
    """Both ops, loaded; of the device that was in use then."""

    functions: dict[str, int]
    threads: int  # of a block
    split: bool  # whether each field of PagesArgs is a parameter of its own


class Driver(abc.ABC):
    vendor: ClassVar[Vendor]
    symbols: ClassVar[dict[str, str]]
    """By the names of _ARGUMENTS: what the vendor calls it."""
    map_flags: ClassVar[int]
    """Of memory pinned for every context, with an address on the device."""
    batches = False
    """Whether `batch` is there."""

    def __init__(self, path: str) -> None:
        """Raises OSError if there is no such library, AttributeError if it lacks a call."""
        self.path = path
        self.library = ctypes.CDLL(path)
        self._calls = {}
        for name, arguments in _ARGUMENTS.items():
            call = getattr(self.library, self.symbols[name])
            call.argtypes, call.restype = arguments, c_int
            self._calls[name] = call
        self._call("init", 0)

    @abc.abstractmethod
    def use(self, device: int) -> None:
        """What the calling thread does from now on, it does on that device."""

    @abc.abstractmethod
    def error_of(self, status: int) -> tuple[str, str]:
        """The driver's name and message for a status."""

    def pci_address(self, device: int) -> str:
        """Where the device is plugged in: 0000:3b:00.0."""
        text = ctypes.create_string_buffer(32)
        self._call("pci_address", text, len(text), device)
        return text.value.decode().lower()

    # --- kernels

    def load(self, image: bytes | Compiled) -> Kernels:
        if isinstance(image, Compiled):
            modules = {op: self._made("load", one) for op, one in image.images.items()}
            threads, split = image.threads, True
        else:
            modules = dict.fromkeys((GATHER, SCATTER), self._made("load", image))
            threads, split = BLOCK, False
        functions = {op: self._made("function", at, op.encode()) for op, at in modules.items()}
        return Kernels(functions, threads, split)

    def launch(self, kernels: Kernels, op: str, args: PagesArgs, stream: int) -> None:
        parameters = _parameters(args, split=kernels.split)
        grid, block = (args.grid, 1, 1), (kernels.threads, 1, 1)
        self._call("launch", kernels.functions[op], *grid, *block, 0, stream, parameters, None)

    # --- streams and events

    def stream(self) -> int:
        """A stream that neither waits for the default one nor is waited for."""
        return self._made("stream", _STREAM_NON_BLOCKING)

    def stream_wait(self, stream: int, event: int) -> None:
        """What is put into the stream from now on runs after the event."""
        self._call("stream_wait", stream, event, 0)

    def stream_end(self, stream: int) -> None:
        self._call("stream_end", stream)

    def event(self) -> int:
        return self._made("event", _EVENT_NO_TIMING)

    def event_record(self, event: int, stream: int) -> None:
        """The event is over when all is that was put into the stream before."""
        self._call("event_record", event, stream)

    def event_over(self, event: int) -> bool:
        """Raises DriverError if what came before it failed."""
        status = self._calls["event_query"](event)
        if status == _NOT_READY:
            return False
        self._check("event_query", status)
        return True

    def event_wait(self, event: int) -> None:
        """Blocks the calling thread. Raises DriverError if what came before it failed."""
        self._call("event_wait", event)

    def event_end(self, event: int) -> None:
        self._call("event_end", event)

    # --- memory

    def allocate(self, num_bytes: int) -> int:
        """Memory of the device."""
        return self._made("allocate", num_bytes)

    def free(self, address: int) -> None:
        self._call("free", address)

    def allocate_host(self, num_bytes: int) -> int:
        """Pinned memory of the host, at its address here."""
        return self._made("allocate_host", num_bytes, self.map_flags)

    def free_host(self, address: int) -> None:
        self._call("free_host", address)

    def to_device(self, device: int, host: int, num_bytes: int, stream: int) -> None:
        self._call("to_device", device, host, num_bytes, stream)

    def to_host(self, host: int, device: int, num_bytes: int, stream: int) -> None:
        self._call("to_host", host, device, num_bytes, stream)

    def batch(self, to: int, source: int, sizes: int, count: int, stream: int) -> None:
        """Copy `count` pieces, at most BATCH_PIECES, in any order; the arguments are addresses of
        arrays of int64, which are read before this returns. Memory of the host is pinned, and named
        by its address here.
        """
        raise NotImplementedError(f"{self.vendor} has no copies in batches")

    def pin(self, host: int, num_bytes: int) -> int:
        """Keep memory where it is, for the device to reach: its address there, which need not be
        the one here.
        """
        self._call("pin", host, num_bytes, self.map_flags)
        try:
            return self._made("device_address", host, 0)
        except DriverError:
            self.unpin(host)
            raise

    def unpin(self, host: int) -> None:
        self._call("unpin", host)

    # --- inside

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, self._calls[name](*arguments))

    def _made(self, name: str, *arguments: object) -> int:
        """What a call writes to its first argument."""
        made = c_void_p()
        self._call(name, byref(made), *arguments)
        return made.value or 0

    def _check(self, name: str, status: int) -> None:
        self._check_named(self.symbols[name], status)

    def _check_named(self, symbol: str, status: int) -> None:
        if status:
            raise DriverError(symbol, status, *self.error_of(status))


def _parameters(args: PagesArgs, *, split: bool) -> "ctypes.Array[c_void_p]":
    """Where a driver finds them. Triton appends pointers to scratch memory, none, one or two by its
    version: no kernel of ours uses any, and a driver reads no more than a kernel takes.
    """
    begin = ctypes.addressof(args)
    places = [begin]
    if split:
        places = [begin + getattr(PagesArgs, name).offset for name, _ in PagesArgs._fields_]
        places += [ctypes.addressof(_NO_SCRATCH)] * 2
    return (c_void_p * len(places))(*places)


def mapped_library(name: str, maps: Path = Path("/proc/self/maps")) -> str | None:
    """The library whose file name begins so, where this process has it already: a second copy
    would know nothing of the first one's contexts.
    """
    for line in maps.read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith(name):
            return f"/{path}"
    return None
