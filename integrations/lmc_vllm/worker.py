"""The worker side: copies blocks where the scheduler says, in the background.

    before the forward   fence: stores of freed blocks are over; early stores are done here
    after the forward    loads begin; stores of what the forward filled begin
    every step           what is over is reported, and which adapters were loaded

Owned by the worker's thread, but for `take_report` and `take_adapters`, which a scheduler in the
same process may call too (one thread runs both).
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lmc.tiers.arena import Arena
from lmc.transfer import Copier, Job, Piece, Transfer, copier_of, resolve

from . import compat
from .adapters import digest_of
from .pools import pools_of
from .wire import Load, Loaded, Move, Place, Registered, Report, Step, Store, machine_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lmc.config import Config
    from lmc.transfer import PagedPool

    from .groups import Group

log = logging.getLogger("lmc")

FINISH_S = 2.0


def engine_streams() -> list[int]:
    """The streams a GPU's forwards run in."""
    return [torch.cuda.current_stream().cuda_stream]


class WorkerSide:
    def __init__(self, vllm_config: Any, kv_cache_config: Any, groups: Sequence[Group]) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._groups = groups
        self._pools: list[PagedPool | None] = []  # by group; none without a layer in this stage
        self._places: list[tuple[Arena, int]] = []  # by group: memory, bytes of workers before
        self._rank = (0, 0)
        self._copies_out = True  # else another worker holds the same KV
        self._copier: Copier | None = None
        self._stores: dict[int, Job] = {}
        self._loads: dict[str, Job] = {}
        self._failed_loads: list[str] = []
        self._void: set[str] = set()  # loads under way that nobody wants any more
        self._over: Counter[int] = Counter()
        self._failed: set[int] = set()
        self._adapters: list[Loaded] = []
        self._introduced = False  # whether a report said who this is

    # --- start

    def register(
        self, kv_caches: Mapping[str, Any], rank: tuple[int, int], config: Config, replicas: int
    ) -> None:
        """Describe the KV cache. Raises ValueError naming what is not served."""
        self._pools = pools_of(self._groups, self._kv_cache_config.num_blocks, kv_caches)
        self._rank = rank
        self._copies_out = rank[1] % replicas == 0
        backend = resolve(
            config.kernels, self._device, copy=config.gpu_copy, blocks=config.gpu_blocks
        )
        self._copier = copier_of(backend, engine_streams)

    @property
    def _device(self) -> torch.device:
        pools = (pool.device for pool in self._pools if pool is not None)
        return next(pools, torch.device("cpu"))  # a model without a KV cache has no pool

    def registered(self) -> Registered:
        layer_names = [name for group in self._groups for name in group.layer_names]
        attention = {compat.attention_of(self._vllm_config, name) for name in layer_names}
        return Registered(
            page_bytes=[() if pool is None else pool.page_bytes for pool in self._pools],
            fields={
                "attention": ",".join(sorted(attention)),
                "layout": str(self._kv_cache_config.kv_cache_layout),
                "device": self._device.type,
            },
            machine=machine_id(),
            pid=os.getpid(),
            rank=self._rank,
            direct=self,
        )

    # --- a step

    def before_forward(self, step: Step) -> None:
        if step.places is not None:
            self._attach(step.places[self._rank])
        early = [self._store(store, hurry=True) for store in step.early]
        wanted = [job for job in [*map(self._stores.get, step.fence), *early] if job is not None]
        assert self._copier is not None
        self._copier.fence(wanted)

    def start_loads(self, step: Step) -> None:
        self._void.update(self._loads.keys() & set(step.void))
        for load in step.loads:
            self._load(load)

    def start_stores(self, step: Step) -> None:
        for store in step.stores:
            self._store(store)

    def take_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose loads are over, and those of them that failed."""
        over = {request_id for request_id, job in self._loads.items() if job.done()}
        failed = set(self._failed_loads)
        for request_id in over:
            if (error := self._loads.pop(request_id).error) is not None:
                log.error("lmc could not load the KV of request %s: %s", request_id, error)
                failed.add(request_id)
        failed |= over & self._void
        self._void -= over
        self._failed_loads.clear()
        return over | failed, failed

    def take_report(self) -> Report | None:
        """Stores that are over and adapters that were loaded since the last call."""
        for number in [number for number, job in self._stores.items() if job.done()]:
            error = self._stores.pop(number).error
            self._over[number] += 1
            if error is not None:
                log.error("lmc could not copy blocks: %s", error)
                self._failed.add(number)
        if self._introduced and not self._over and not self._adapters:
            return None
        report = Report(self._over, self._failed, self.take_adapters())
        if not self._introduced and self._pools:
            self._introduced = True
            report.registered[self._rank] = self.registered()
        self._over, self._failed = Counter(), set()
        return report

    @contextmanager
    def loading(self, lora: Any) -> Iterator[None]:
        """Around vLLM's reading of an adapter: what was there before and after was read."""
        before = _digest_of(lora)
        yield
        digest = before if before == _digest_of(lora) else None
        name = (lora.lora_name, lora.lora_path)
        self._adapters.append(Loaded(self._rank, lora.lora_int_id, name, digest))

    def take_adapters(self) -> list[Loaded]:
        """Adapters that were loaded since the last call, in order."""
        taken, self._adapters = self._adapters, []
        return taken

    def finish_stores(self, more: Sequence[Store]) -> None:
        """Have all stores end now, and `more` that no step will bring; waits for FINISH_S at most.
        For a scheduler in the same process.
        """
        for store in more:
            self._store(store)
        deadline = time.monotonic() + FINISH_S
        for job in self._stores.values():
            job.wait(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Wait for copies that run, cancel the others. May be called again."""
        if self._copier is not None:
            self._copier.close()

    # --- inside

    def _attach(self, places: Sequence[Place]) -> None:
        try:
            self._places = [(Arena.attach(place.arena), place.bytes_before) for place in places]
            for arena, _ in self._places:
                assert self._copier is not None
                self._copier.pin(arena.slices)
        except OSError as error:
            log.warning("lmc keeps nothing: a worker cannot reach the memory for it: %s", error)

    def _store(self, store: Store, *, hurry: bool = False) -> Job | None:
        if not (self._copies_out and self._places):
            self._over[store.job] += 1
            if not self._places:
                self._failed.add(store.job)
            return None
        assert self._copier is not None
        job = self._copier.store(self._transfers(store.moves), hurry=hurry)
        self._stores[store.job] = job
        return job

    def _load(self, load: Load) -> None:
        assert self._copier is not None
        if load.moves is None or not self._places:
            self._failed_loads.append(load.request_id)
        else:
            self._loads[load.request_id] = self._copier.load(self._transfers(load.moves))

    def _transfers(self, moves: Sequence[Move]) -> list[Transfer]:
        transfers = []
        for move in moves:
            if (pool := self._pools[move.group]) is not None:
                arena, before = self._places[move.group]
                pieces = [
                    Piece(
                        arena.address(run.slot) + run.total * before,
                        run.total,
                        run.first,
                        run.pages,
                    )
                    for run in move.runs
                ]
                transfers.append(Transfer(pool, torch.tensor(move.block_ids), pieces))
        return transfers


def _digest_of(lora: Any) -> bytes | None:
    try:
        return digest_of(compat.adapter_folder(lora), is_3d=lora.is_3d_lora_weight)
    except OSError as error:
        log.info("lmc cannot tell adapter %s apart from others: %s", lora.lora_name, error)
        return None
