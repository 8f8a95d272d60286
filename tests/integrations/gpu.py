"""A device for harnesses: a fake GPU (tests/kernels/fake_driver.cpp), whose streams do nothing
before they are waited for. The forward is a stream's work as well: it reads what the tree gave and
what was loaded, layer by layer, and writes the rest. What lmc forgets to wait for, or to have
SGLang wait for, are wrong bytes.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from tests.integrations.harness import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmc_sglang.linker import LmcLinker
    from tests.integrations.harness import Rows
    from tests.kernels.fake import Fake


class Gpu(Host):
    """SGLang's streams on a GPU of the vendor's: the scheduler's, which is the current one, and
    that of forwards, in which they run if there is overlap.
    """

    def __init__(self, fake: Fake, *, overlap: bool = True, **policy: object) -> None:
        self.fake, self.driver, self.policy = fake, fake.driver, policy
        self.driver.use(0)
        fake.set("patience", 5)  # a copy is not over for having been looked at
        self.own, self.forwards = self.driver.stream(), self.driver.stream()
        self.current, self.model = self.own, self.forwards if overlap else self.own
        self.forward_stream = SimpleNamespace(cuda_stream=self.forwards)
        self._written: list[torch.Tensor] = []  # what copies that have not run read
        self._owned: list[ctypes.c_void_p] = []
        self._read: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @property
    def current_stream(self) -> SimpleNamespace:
        """As torch tells of it."""
        return SimpleNamespace(cuda_stream=self.current)

    def backend(self) -> object:
        return self.fake.backend(**self.policy)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The model's stream is the current one, after what the scheduler's holds."""
        with self._event(self.own) as event:
            self.driver.stream_wait(self.model, event)
        self.current = self.model
        yield
        self.current = self.own

    def write(self, rows: Rows, at: torch.Tensor, values: torch.Tensor) -> None:
        values = values.contiguous()
        self._written.append(values)
        for to, fro, size in self._runs(rows, at, values):
            self.driver.to_device(to, fro, size, self.model)

    def read(self, rows: Rows, at: torch.Tensor, want: torch.Tensor) -> None:
        found = torch.zeros_like(want)
        self._read.append((f"buffer {rows.number}, layer {rows.layer}", found, want))
        for fro, to, size in self._runs(rows, at, found):
            self.driver.to_host(to, fro, size, self.model)

    def _runs(
        self, rows: Rows, at: torch.Tensor, image: torch.Tensor
    ) -> Iterator[tuple[int, int, int]]:
        """(address, the same in the image, bytes) of rows that lie side by side."""
        size, here, there = image.shape[1], image.data_ptr(), rows.bytes.data_ptr()
        cuts = (torch.nonzero(at[1:] != at[:-1] + 1).flatten() + 1).tolist()
        for begin, end in pairwise([0, *cuts, len(at)]):
            yield there + int(at[begin]) * size, here + begin * size, (end - begin) * size

    def finish(self) -> None:
        """Until both streams are empty; the forwards have read what they should."""
        for stream in (self.forwards, self.own):  # the scheduler's may wait for whole loads
            with self._event(stream) as event:
                self.driver.event_wait(event)
        for what, found, want in self._read:
            assert torch.equal(found, want), what
        self._read.clear()
        self._written.clear()

    @contextmanager
    def _event(self, stream: int) -> Iterator[int]:
        event = self.driver.event()
        self.driver.event_record(event, stream)
        yield event
        self.driver.event_end(event)

    def begin(self, buffers: list[torch.Tensor], linker: LmcLinker) -> None:
        for buffer in buffers:
            self._owned.append(ctypes.c_void_p(buffer.data_ptr()))
            self.fake.library.fake_own(self._owned[-1], ctypes.c_size_t(buffer.nbytes))
        for pinner in linker._copier._pinners:
            assert pinner.wait(10)

    def let_close(self) -> None:
        self.fake.set("unstick", 1)  # or it waits for ever
        for address in self._owned:
            self.fake.library.fake_disown(address)

    def end(self) -> None:
        self.driver.stream_end(self.own)
        self.driver.stream_end(self.forwards)
