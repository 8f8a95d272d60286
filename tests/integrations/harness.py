"""SGLang's cache, allocator and pool with lmc's linker attached, in this process: no engine, no
model.

Plays the scheduler's part by hand: arrival, match, load, forward, insertion, eviction. The forward
reads what was found, layer by layer as SGLang's pools have it wait, and writes the rest; where a
device does that, in its streams (gpu.py), it may run much later.
"""

from __future__ import annotations

import random
import time
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from lmc_sglang import compat
from lmc_sglang.linker import LmcLinker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS, HEADS, DIM = 4, 2, 32
LAYOUTS = ("nhd", "hnd", "vectorized_5d")
DRAFT = 1000
"""The layer of a draft model: it runs behind the model, and waits for nothing of its own."""
NOTHING = torch.empty(0, dtype=torch.int64)


def tokens(seed: int, n: int) -> array:
    rng = random.Random(seed)
    return array("q", (rng.randrange(5, 1000) for _ in range(n)))


class Request(SimpleNamespace):
    """As much of a request as cache and linker look at."""

    def __init__(self, rid: str, ids: array, **more: object) -> None:
        super().__init__(
            rid=rid,
            kv=None,
            session=None,
            swa_branching_seqlen=None,
            origin_input_ids=ids,
            output_ids=array("q"),
            extra_key=None,
            cache_salt=None,
            lora_id=None,
        )
        self.__dict__.update(more)


def pool_of(layout: str, page: int, size: int) -> MHATokenToKVPool:
    """In a layout of SGLang's, two of which need a switch, and one of these a GPU of AMD's."""
    shape = {"dtype": torch.float32, "head_num": HEADS, "head_dim": DIM, "layer_num": LAYERS}
    with (
        envs.SGLANG_USE_HND_KVCACHE.override(layout == "hnd"),
        pytest.MonkeyPatch.context() as patch,
    ):
        if layout == "vectorized_5d":
            patch.setattr("sglang.srt.mem_cache.memory_pool._use_aiter", True)
            patch.setenv("SGLANG_AITER_KV_CACHE_LAYOUT", layout)
        pool = MHATokenToKVPool(
            size=size, page_size=page, device="cpu", enable_memory_saver=False, **shape
        )
    assert pool.kv_cache_layout == layout
    return pool


@dataclass(frozen=True)
class Rows:
    """A buffer that `layer` reads: a row is a slot, or `page` of them in an order of its own."""

    buffer: torch.Tensor
    number: int
    layer: int
    page: int = 1
    order: Callable[[torch.Tensor], torch.Tensor] = lambda values: values.flatten(1)
    """From [rows, slots, bytes] to [rows, bytes]."""

    @property
    def bytes(self) -> torch.Tensor:
        return self.buffer.view(self.buffer.shape[0], -1).view(torch.uint8)

    def values(self, hashes: torch.Tensor) -> torch.Tensor:
        """What slots hold where the tokens so far hash to this."""
        width = self.buffer[0].numel() * self.buffer.element_size() // self.page
        lane = (torch.arange(width) + 31 * self.number) % 251
        of_hash = hashes.to(torch.int32).view(-1, 1).view(torch.uint8)
        return of_hash.repeat(1, -(-width // 4))[:, :width] + lane.to(torch.uint8)

    def at(self, slots: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of whole pages, and their bytes where slots hold these values."""
        rows = slots[:: self.page] // self.page
        return rows, self.order(values.view(-1, self.page, values.shape[1]))

    def put(self, slots: torch.Tensor, hashes: torch.Tensor) -> None:
        rows, values = self.at(slots, self.values(hashes))
        self.bytes[rows] = values

    def holds(self, slots: torch.Tensor, hashes: torch.Tensor) -> bool:
        rows, values = self.at(slots, self.values(hashes))
        return torch.equal(self.bytes[rows], values)


def order_of(layout: str, buffer: torch.Tensor, page: int) -> dict[str, Any]:
    """How SGLang's kernels lay out a page of [slots, heads, dim]."""
    if layout == "nhd":
        return {}
    x = buffer.shape[-1]

    def order(values: torch.Tensor) -> torch.Tensor:
        values = values.view(-1, page, HEADS, DIM, buffer.element_size())
        if layout == "hnd":
            return values.transpose(1, 2).flatten(1)
        if buffer.shape[3] == page:  # K
            return values.unflatten(3, (-1, x)).permute(0, 2, 3, 1, 4, 5).flatten(1)
        return values.unflatten(1, (-1, x)).permute(0, 3, 1, 4, 2, 5).flatten(1)

    return {"page": page, "order": order}


class Host:
    """What runs the forwards: here at once."""

    forward_stream: Any = None

    def begin(self, buffers: list[torch.Tensor], linker: LmcLinker) -> None:
        """These are on the device."""

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is inside is a forward's."""
        yield

    def write(self, rows: Rows, at: torch.Tensor, values: torch.Tensor) -> None:
        rows.bytes[at] = values

    def read(self, rows: Rows, at: torch.Tensor, want: torch.Tensor) -> None:
        """It must find this."""
        assert torch.equal(rows.bytes[at], want), f"buffer {rows.number}, layer {rows.layer}"

    def finish(self) -> None:
        """The forwards run to their ends."""

    def let_close(self) -> None:
        """Nothing is waited for in vain from now on."""


@dataclass
class Turn:
    """A request that was admitted: the slots it found on the device and those being loaded."""

    ids: array
    req: Request
    path: torch.Tensor = field(default_factory=lambda: NOTHING)
    loaded: torch.Tensor = field(default_factory=lambda: NOTHING)
    index: int = -1  # of the load
    unlock: Callable[[], object] = lambda: None
    state: torch.Tensor = field(default_factory=lambda: NOTHING)  # that it goes on from
    made: torch.Tensor = field(default_factory=lambda: NOTHING)  # that it leaves

    @property
    def prefix(self) -> torch.Tensor:
        return torch.cat([self.path, self.loaded])


class Harness:
    def __init__(
        self,
        server_args,
        page: int = 64,
        size: int = 8192,
        layout: str = "nhd",
        group: torch.distributed.ProcessGroup | None = None,
        device: Any = None,
    ) -> None:
        self.page, self.server_args, self.size = page, server_args, size
        self.device = device or Host()
        self.make_pools(page, size, layout)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.make_table(size),
            token_to_kv_pool_allocator=self.alloc,
            page_size=page,
            tp_cache_group=group,
            attn_tp_cache_group=group,
            tree_components=self.components,
            **self.params_of(),
        )
        self.params = params
        self.cache = UnifiedRadixCache(params)
        self.linker = LmcLinker(
            server_args,
            params,
            components=set(self.components),
            extra_config={},
            forward_stream=self.device.forward_stream,
        )
        self.cache.init_cache_linker(self.linker)
        self.store = self.linker.lanes[0].store
        self.device.begin([rows.bytes for rows in self.all_rows], self.linker)
        self._rid = 0

    # --- what is served

    components: tuple[ComponentType, ...] = (ComponentType.FULL,)

    def make_pools(self, page: int, size: int, layout: str) -> None:
        self.pool = pool_of(layout, page, size)
        kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        pages = () if page == 1 else (page,)
        self.alloc = kind(size, *pages, torch.float32, "cpu", self.pool, need_sort=False)
        both = zip(self.pool.k_buffer, self.pool.v_buffer, strict=True)
        self.rows = [
            Rows(buffer, 2 * layer + part, layer, **order_of(layout, buffer, page))
            for layer, k_and_v in enumerate(both)
            for part, buffer in enumerate(k_and_v)
        ]

    @property
    def allocators(self) -> list[Any]:
        return [self.alloc]

    def make_table(self, size: int) -> ReqToTokenPool:
        return ReqToTokenPool(size=8, max_context_len=size, device="cpu", enable_memory_saver=False)

    def params_of(self) -> dict[str, object]:
        """What else SGLang's cache is told."""
        return {}

    # --- bytes

    @property
    def all_rows(self) -> list[Rows]:
        return self.rows

    def hashes(self, ids: array) -> torch.Tensor:
        """Of the tokens up to each: KV is a function of these."""
        found, h = torch.empty(len(ids), dtype=torch.int64), 0
        for i, token in enumerate(ids):
            h = (h * 1_000_003 + token) % (1 << 30)
            found[i] = h
        return found

    def compute(self, ids: array, start: int, slots: torch.Tensor) -> None:
        """At once, wherever forwards run."""
        hashes = self.hashes(ids)[start : start + len(slots)]
        for rows in self.rows:
            rows.put(slots, hashes)

    def check(self, ids: array, slots: torch.Tensor, start: int = 0) -> None:
        hashes = self.hashes(ids)[start : start + len(slots)]
        for rows in self.rows:
            assert rows.holds(slots, hashes), f"buffer {rows.number}"

    # --- a forward

    def reads(self, turn: Turn) -> list[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """(buffer, slots, hashes of what must be there) of a request's prefix."""
        hashes = self.hashes(turn.ids)[: len(turn.prefix)]
        return [(rows, turn.prefix, hashes) for rows in self.rows]

    def writes(
        self, turn: Turn, rest: torch.Tensor
    ) -> list[tuple[Rows, torch.Tensor, torch.Tensor]]:
        have = len(turn.prefix)
        hashes = self.hashes(turn.ids)[have : have + len(rest)]
        return [(rows, rest, hashes) for rows in self.rows]

    def wait_for(self, layer: int) -> None:
        """As SGLang's pool does before it is read."""
        if layer != DRAFT:
            self.linker.layer_done_counter.wait_until(layer)

    def forward(self, turn: Turn, rest: torch.Tensor) -> None:
        """Read the prefix and write the rest, layer by layer, as a model does."""
        reads, writes = self.reads(turn), self.writes(turn, rest)
        with self.device.forward():
            self.linker.layer_done_counter.set_consumer(turn.index)
            for layer in sorted({rows.layer for rows, *_ in (*reads, *writes)}):
                self.wait_for(layer)
                for rows, slots, hashes in reads:
                    if rows.layer == layer and len(slots):
                        self.device.read(rows, *rows.at(slots, rows.values(hashes)))
                for rows, slots, hashes in writes:
                    if rows.layer == layer and len(slots):
                        self.device.write(rows, *rows.at(slots, rows.values(hashes)))

    # --- the scheduler's part

    def step(self) -> None:
        self.cache.check_hicache_events()

    def settle(self) -> None:
        """Steps until every offload has completed."""
        while self.cache.linker.pending_offloads:
            time.sleep(0.001)
            self.step()

    def whole(self, ids: array) -> array:
        return ids[: len(ids) // self.page * self.page]

    def arrive(self, ids: array, **more: object) -> Request:
        self._rid += 1
        req = Request(f"r{self._rid}", ids, **more)
        self.linker.request_arrived(req)
        return req

    def match(self, req: Request) -> object:
        key = RadixKey(
            req.origin_input_ids,
            req.extra_key,
            limit=len(req.origin_input_ids) - 1,
            cache_salt=req.cache_salt,
        )
        return self.cache.match_prefix(MatchPrefixParams(key=key, req=req))

    def admit(self, req: Request) -> object:
        """Match until the request is not passed over any more."""
        while True:
            self.step()
            match = self.match(req)
            if not self.linker.passes_over(req.rid):
                return match
            self.linker.nap()

    def load(self, req: Request, match: Any) -> Turn:
        """It is admitted: its path is locked, and what was promised is asked for."""
        node, length = match.last_device_node, match.device_prefix_len
        lock = self.cache.inc_lock_ref(node).to_dec_params()
        turn = Turn(req.origin_input_ids, req, unlock=partial(self.cache.dec_lock_ref, node, lock))
        if length:
            turn.path = self.cache.path_device_indices(node)[:length]
        if match.host_hit_length:
            turn.index = self.load_back(req, match)
            turn.loaded = self.cache.linker.private_load_indices[req.rid]
        return turn

    def load_back(self, req: Request, match: object) -> int:
        """Ask for what was promised; the number of the load."""
        req.last_node = match.last_device_node
        self.cache.init_load_back(
            InitLoadBackParams(
                best_match_node=match.best_match_node,
                host_hit_length=match.host_hit_length,
                req=req,
            )
        )
        return self.cache.ready_to_load_host_cache()

    def insert(
        self,
        ids: array,
        slots: torch.Tensor,
        prev: int = 0,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        **params: Any,
    ) -> Any:
        length = len(self.whole(ids))
        key = RadixKey(ids[: length + self.params.is_eagle], extra_key, cache_salt=cache_salt)
        return self.cache.insert(
            InsertParams(key=key, value=slots[:length], prev_prefix_len=prev, **params)
        )

    def begin(self, ids: array, **more: object) -> Turn:
        """A request comes and is admitted."""
        req = self.arrive(ids, **more)
        return self.load(req, self.admit(req))

    def serve(self, turn: Turn) -> None:
        """Its forward, and SGLang keeps what it computed. Every byte it read is checked, by the
        time the device has finished.
        """
        rest = self.alloc_tokens(len(self.whole(turn.ids)) - len(turn.prefix))
        self.forward(turn, rest)
        assert self.cache.linker.finish_loads() == []
        self.keep(turn, rest)

    def keep(self, turn: Turn, rest: torch.Tensor, **params: Any) -> Any:
        key = {"extra_key": turn.req.extra_key, "cache_salt": turn.req.cache_salt}
        slots = torch.cat([turn.prefix, rest])
        result = self.insert(turn.ids, slots, len(turn.path), **key, **params)
        turn.unlock()
        return result

    def drop(self, turn: Turn) -> None:
        """It ends before its forward: SGLang frees what it had."""
        if len(turn.loaded):
            self.alloc.free(turn.loaded)
        turn.unlock()

    def run(self, ids: array, **more: object) -> int:
        """A whole request: how many tokens of its prefix need not be computed."""
        turn = self.begin(ids, **more)
        self.serve(turn)
        return len(turn.prefix)

    def alloc_tokens(self, n: int) -> torch.Tensor:
        for make_room in (lambda: self.evict(n), self.settle, lambda: self.evict(n)):
            if n > self.alloc.available_size():
                make_room()
        return self.alloc.alloc(n) if n else NOTHING

    def evict(self, n: int) -> None:
        self.cache.evict(EvictParams(num_tokens=n))

    def reset(self) -> None:
        """SGLang flushes its tree, at once, whatever is under way."""
        self.cache.reset()
        self.alloc.clear()

    def flush(self) -> None:
        """When all is over; what was on the device is wiped."""
        self.device.finish()
        self.settle()
        self.reset()
        for rows in self.all_rows:
            rows.bytes.zero_()

    def close(self) -> None:
        self.device.let_close()
        self.cache.release_host_resources()
        compat.stop_listening(self.linker)
