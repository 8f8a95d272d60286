"""SGLang's cache, allocator and pool with lmc's linker attached, in this process: no engine, no
model.

Plays the scheduler's part by hand: arrival, match, load, insert, eviction, one step after the
other.
"""

from __future__ import annotations

import random
import time
from array import array
from types import SimpleNamespace

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

LAYERS, HEADS, DIM = 4, 2, 32
LAYOUTS = ("nhd", "hnd", "vectorized_5d")


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


class Harness:
    def __init__(
        self,
        server_args,
        page: int = 64,
        size: int = 8192,
        layout: str = "nhd",
        group: torch.distributed.ProcessGroup | None = None,
        **arguments: object,
    ) -> None:
        self.page, self.server_args, self.size = page, server_args, size
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
            server_args, params, components=set(self.components), extra_config={}, **arguments
        )
        self.cache.init_cache_linker(self.linker)
        self.store = self.linker.lanes[0].store
        self._rid = 0

    # --- what is served

    components: tuple[ComponentType, ...] = (ComponentType.FULL,)

    def make_pools(self, page: int, size: int, layout: str) -> None:
        self.pool = pool_of(layout, page, size)
        kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        pages = () if page == 1 else (page,)
        self.alloc = kind(size, *pages, torch.float32, "cpu", self.pool, need_sort=False)

    def make_table(self, size: int) -> ReqToTokenPool:
        return ReqToTokenPool(size=8, max_context_len=size, device="cpu", enable_memory_saver=False)

    def params_of(self) -> dict[str, object]:
        """What else SGLang's cache is told."""
        return {}

    # --- bytes

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [*self.pool.k_buffer, *self.pool.v_buffer]

    def expected(self, ids: array) -> list[torch.Tensor]:
        """KV as a function of the tokens so far: what a prefix of `ids` must hold, layer by
        layer.
        """
        prefix, h = torch.empty(len(ids)), 0
        for i, token in enumerate(ids):
            h = (h * 1_000_003 + token) % (1 << 20)
            prefix[i] = h
        lane = torch.arange(HEADS * DIM).view(1, HEADS, DIM)
        return [prefix.view(-1, 1, 1) + 7 * plane + lane / 64 for plane in range(2 * LAYERS)]

    def places(self, buffer: torch.Tensor, slots: torch.Tensor) -> tuple[object, ...]:
        """Index of [slots, heads, dim] in a buffer, as SGLang's kernels have it."""
        layout = self.pool.kv_cache_layout
        if layout == "nhd":
            return (slots,)
        page, at = slots // self.page, slots % self.page
        if layout == "hnd":
            return page[:, None], torch.arange(HEADS), at[:, None]
        x = buffer.shape[-1]
        head, dim = torch.arange(HEADS).view(1, -1, 1), torch.arange(DIM).view(1, 1, -1)
        page, at = page.view(-1, 1, 1), at.view(-1, 1, 1)
        if buffer.shape[3] == self.page:  # K
            return page, head, dim // x, at, dim % x
        return page, head, at // x, dim, at % x

    def put(self, buffer: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        buffer[self.places(buffer, slots)] = values

    def compute(self, ids: array, start: int, slots: torch.Tensor) -> None:
        for buffer, want in zip(self.buffers, self.expected(ids), strict=True):
            self.put(buffer, slots, want[start : start + len(slots)])

    def check(self, ids: array, slots: torch.Tensor, start: int = 0) -> None:
        for buffer, want in zip(self.buffers, self.expected(ids), strict=True):
            found = buffer[self.places(buffer, slots)]
            assert torch.equal(found, want[start : start + len(slots)])

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

    def load(self, req: Request, match: object) -> torch.Tensor:
        """Load what was promised; the slots, with the right bytes in them."""
        self.linker.layer_done_counter.set_consumer(self.load_back(req, match))
        slots = self.cache.linker.private_load_indices[req.rid]
        assert self.cache.linker.finish_loads() == []
        return slots

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

    def insert(self, ids: array, slots: torch.Tensor, prev: int = 0, **key: object) -> None:
        ids = self.whole(ids)
        self.cache.insert(
            InsertParams(key=RadixKey(ids, **key), value=slots[: len(ids)], prev_prefix_len=prev)
        )

    def run(self, ids: array, **more: object) -> int:
        """A whole request: how many tokens of its prefix need not be computed. Checks every byte of
        them.
        """
        req = self.arrive(ids, **more)
        match = self.admit(req)
        device, host = match.device_prefix_len, match.host_hit_length
        path = (
            self.cache.path_device_indices(match.last_device_node)[:device]
            if device
            else torch.empty(0, dtype=torch.int64)
        )
        self.check(ids, path)
        loaded = self.load(req, match) if host else torch.empty(0, dtype=torch.int64)
        self.check(ids, loaded, device)
        have = device + host
        rest = self.alloc_tokens(len(self.whole(ids)) - have)
        self.compute(ids, have, rest)
        key = {"extra_key": more.get("extra_key"), "cache_salt": more.get("cache_salt")}
        self.insert(ids, torch.cat([path, loaded, rest]), prev=device, **key)
        return have

    def alloc_tokens(self, n: int) -> torch.Tensor:
        if n > self.alloc.available_size():
            self.evict(n)
        return self.alloc.alloc(n) if n else torch.empty(0, dtype=torch.int64)

    def evict(self, n: int) -> None:
        self.cache.evict(EvictParams(num_tokens=n))

    def flush(self) -> None:
        self.settle()
        self.cache.reset()
        self.alloc.clear()
        for buffer in self.buffers:
            buffer.zero_()

    def close(self) -> None:
        self.cache.release_host_resources()
        compat.stop_listening(self.linker)
