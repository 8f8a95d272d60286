"""The harness on a fake GPU (tests/kernels/fake_driver.cpp), whose streams do nothing before they
are waited for. The forward is a stream's work as well: it reads what the tree gave and what was
loaded, layer by layer, and writes the rest. What lmc forgets to wait for, or to have SGLang wait
for, are wrong bytes.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from tests.integrations.harness import LAYERS, Harness, Request

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from tests.kernels.fake import Fake

NOTHING = torch.empty(0, dtype=torch.int64)


class Gpu:
    """SGLang's streams on a GPU of the vendor's: the scheduler's, which is the current one, and
    that of forwards, in which they run if there is overlap.
    """

    def __init__(self, fake: Fake, *, overlap: bool = True, **policy: object) -> None:
        self.fake, self.driver, self.policy = fake, fake.driver, policy
        self.driver.use(0)
        fake.set("patience", 5)  # a copy is not over for having been looked at
        self.own, self.forwards = self.driver.stream(), self.driver.stream()
        self.current, self.model = self.own, self.forwards if overlap else self.own

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

    def finish(self) -> None:
        """Until both streams are empty."""
        for stream in (self.own, self.forwards):
            with self._event(stream) as event:
                self.driver.event_wait(event)

    @contextmanager
    def _event(self, stream: int) -> Iterator[int]:
        event = self.driver.event()
        self.driver.event_record(event, stream)
        yield event
        self.driver.event_end(event)

    def end(self) -> None:
        self.driver.stream_end(self.own)
        self.driver.stream_end(self.forwards)


class GpuHarness(Harness):
    def __init__(self, gpu: Gpu, *arguments: object) -> None:
        self.gpu = gpu
        self._kept: list[torch.Tensor] = []  # what copies that have not run read
        self._read: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        forwards = SimpleNamespace(cuda_stream=gpu.forwards)
        super().__init__(*arguments, forward_stream=forwards)
        for buffer in self.buffers:
            size = buffer.numel() * buffer.element_size()
            gpu.fake.library.fake_own(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(size))
        [pinner] = self.linker._copier._pinners
        assert pinner.wait(10)

    # --- bytes, by the model's stream

    def runs(self, buffer: torch.Tensor, slots: torch.Tensor) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the rows that hold these slots."""
        size = buffer.stride(0) * buffer.element_size()
        tokens = 1 if self.pool.kv_cache_layout == "nhd" else self.page
        rows = sorted(set((slots // tokens).tolist()))
        begin = 0
        for at in range(1, len(rows) + 1):
            if at == len(rows) or rows[at] != rows[at - 1] + 1:
                yield rows[begin] * size, (at - begin) * size
                begin = at

    def write(self, buffer: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        source = torch.zeros_like(buffer)
        self.put(source, slots, values)
        self._kept.append(source)
        for at, size in self.runs(buffer, slots):
            to, fro = buffer.data_ptr() + at, source.data_ptr() + at
            self.gpu.driver.to_device(to, fro, size, self.gpu.model)

    def read(self, buffer: torch.Tensor, slots: torch.Tensor, want: torch.Tensor) -> None:
        found = torch.zeros_like(buffer)
        self._read.append((found, slots, want))
        for at, size in self.runs(buffer, slots):
            to, fro = found.data_ptr() + at, buffer.data_ptr() + at
            self.gpu.driver.to_host(to, fro, size, self.gpu.model)

    def forward(
        self, ids: array, prefix: torch.Tensor, rest: torch.Tensor, index: int = -1
    ) -> None:
        """Read the prefix and write the rest, layer by layer, as attention does."""
        want, have, counter = self.expected(ids), len(prefix), self.linker.layer_done_counter
        with self.gpu.forward():
            counter.set_consumer(index)
            for layer in range(LAYERS):
                counter.wait_until(layer)
                for at in (layer, LAYERS + layer):
                    self.read(self.buffers[at], prefix, want[at][:have])
                    self.write(self.buffers[at], rest, want[at][have : have + len(rest)])

    def finish(self) -> None:
        """The forwards run to their ends, and have read what they should."""
        self.gpu.finish()
        for found, slots, want in self._read:
            assert torch.equal(found[self.places(found, slots)], want)
        self._read.clear()
        self._kept.clear()

    # --- the scheduler's part

    def begin(self, ids: array) -> tuple[Request, torch.Tensor, torch.Tensor, int]:
        """A request is admitted: (request, slots it found, slots loaded, number of the load)."""
        req = self.arrive(ids)
        self.step()
        match = self.match(req)
        path, loaded, index = NOTHING, NOTHING, -1
        if match.device_prefix_len:
            path = self.cache.path_device_indices(match.last_device_node)
        if match.host_hit_length:
            index = self.load_back(req, match)
            loaded = self.cache.linker.private_load_indices[req.rid]
        return req, path[: match.device_prefix_len], loaded, index

    def run(self, ids: array, **_: object) -> int:
        """A whole request; its forward may not have run when this returns (`finish`)."""
        _, path, loaded, index = self.begin(ids)
        prefix = torch.cat([path, loaded])
        rest = self.alloc_tokens(len(self.whole(ids)) - len(prefix))
        self.forward(ids, prefix, rest, index)
        assert self.cache.linker.finish_loads() == []
        self.insert(ids, torch.cat([prefix, rest]), prev=len(path))
        return len(prefix)

    def flush(self) -> None:
        self.finish()
        super().flush()

    def close(self) -> None:
        self.gpu.fake.set("unstick", 1)  # or it waits for ever
        super().close()
        for buffer in self.buffers:
            self.gpu.fake.library.fake_disown(ctypes.c_void_p(buffer.data_ptr()))
