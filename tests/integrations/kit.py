"""SGLang's own test kit of its radix cache with lmc's linker attached: the caches its
`build_fixture` makes, and requests on them.

Three things are not as in SGLang's checkout. `sglang.test.test_utils`, which the kit wants for a
class of tests, wants packages that no engine needs: it is stood in for at import. The wheel has no
Rust core built for inspection: the core of the engine takes its place, which has no white boxes.
And the kit allocates pages as single tokens, from slot 1 on: a page of lmc's, as of every engine's,
begins at a multiple of its size, so the engine's allocator takes that place.
"""

from __future__ import annotations

import random
import sys
import time
import unittest
import warnings
from array import array
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from lmc_sglang import compat
from lmc_sglang.linker import LmcLinker

with pytest.MonkeyPatch.context() as _patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what SGLang warns of at import is its own
    _stand_in = ModuleType("sglang.test.test_utils")
    _stand_in.CustomTestCase = unittest.TestCase  # type: ignore[attr-defined]
    _patch.setitem(sys.modules, _stand_in.__name__, _stand_in)
    from sglang.test.kits.unified_radix_cache import core, fixtures, insert_walk
    from sglang.test.kits.unified_radix_cache.config import CONFIGS, CacheConfig
    from sglang.test.kits.unified_radix_cache.mixins import UnifiedRadixCacheFixtures
    from sglang.test.kits.unified_radix_cache.unified_tree_core_inspection_interface import (
        UnifiedTreeCoreInspectionInterface,
    )

if TYPE_CHECKING:
    from collections.abc import Callable

match_prefix, node_device_value = fixtures.match_prefix, fixtures.node_device_value
__all__ = ["CONFIGS", "CORES", "CacheConfig", "Kit", "Walk", "core", "insert_walk"]

FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
CORES = ("python", "rust")
MOST_TOKENS = 640
"""Of a sequence of a walk, where a page is not more than a few of it."""


class _RustCore(RustUnifiedTreeCore, UnifiedTreeCoreInspectionInterface):
    """The engine's core under the kit's name. A white box of the kit raises AttributeError."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if getattr(found, "__isabstractmethod__", False):
            raise AttributeError(f"the engine's Rust core has no {name}")
        return found


_RustCore.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def _paged(
    *, size: int, dtype: torch.dtype, device: str, kvcache: Any, need_sort: bool
) -> TokenToKVPoolAllocator | PagedTokenToKVPoolAllocator:
    if kvcache.page_size == 1:
        return TokenToKVPoolAllocator(size, dtype, device, kvcache, need_sort)
    return PagedTokenToKVPoolAllocator(
        size, kvcache.page_size, dtype, device, kvcache, need_sort=need_sort
    )


class Kit:
    """Builds the kit's caches, those its own fixtures build included, with a linker each."""

    def __init__(self, server_args: Any, patch: pytest.MonkeyPatch) -> None:
        self._server_args, self._patch = server_args, patch
        self.linkers: list[LmcLinker] = []
        self.caches: list[Any] = []
        self.attaching = True
        self.at_once = False
        """Whether an insertion returns when its offloads have completed."""
        self._build = fixtures.build_fixture
        inspector = ModuleType(
            "sglang.test.kits.unified_radix_cache.rust_unified_tree_core_inspector"
        )
        inspector.RustUnifiedTreeCoreInspector = _RustCore  # type: ignore[attr-defined]
        patch.setitem(sys.modules, inspector.__name__, inspector)
        patch.setattr(fixtures, "TokenToKVPoolAllocator", _paged)
        for module in (core, insert_walk):
            patch.setattr(module, "build_fixture", self.build)

    def use(self, tree_core: str) -> None:
        """What the kit's fixtures build."""
        self._patch.setattr(fixtures, "TREE_CORE_TEST_BACKEND", tree_core)

    def build(self, cfg: CacheConfig, **more: Any) -> tuple[Any, Any, Any]:
        cache, alloc, table = self._build(cfg, **more)
        self.caches.append(cache)
        if self.attaching:
            self._attach(cfg, cache)
        return cache, alloc, table

    def _attach(self, cfg: CacheConfig, cache: Any) -> None:
        """The kit's checks of a tree come with a scheduler's step: nothing else in it polls."""
        params, check = cache.cache_init_params, cache.sanity_check
        linker = LmcLinker(
            self._server_args, params, components=set(cfg.components), extra_config={}
        )
        cache.init_cache_linker(linker)
        self.linkers.append(linker)

        def step_and_check() -> None:
            cache.check_hicache_events()
            check()

        def insert_and_settle(params: InsertParams) -> Any:
            result = insert(params)
            settle(cache)
            return result

        cache.sanity_check = step_and_check
        if self.at_once:
            insert, cache.insert = cache.insert, insert_and_settle

    def close(self) -> None:
        for linker in self.linkers:
            compat.stop_listening(linker)
            linker.close()


def settle(cache: Any) -> None:
    """Steps until every offload has completed and was consumed."""
    while cache.linker.pending_offloads:
        time.sleep(0.0005)
        cache.check_hicache_events()


def _bytes(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(buffer.shape[0], -1).view(torch.uint8)


def _buffers(pool: Any) -> list[torch.Tensor]:
    return [_bytes(buffer) for buffer in (*pool.k_buffer, *pool.v_buffer)]


def _rows(prefix: torch.Tensor, width: int, number: int) -> torch.Tensor:
    """What rows of a buffer hold where the tokens so far hash to `prefix`."""
    return (prefix.view(-1, 1) + torch.arange(width) + 31 * number).to(torch.uint8)


class Walk(UnifiedRadixCacheFixtures):
    """A random walk over the kit's operations: every step leaves a sane tree, every byte that a
    request gets is right, and in the end all slots and locks are back.
    """

    def __init__(self, kit: Kit, cfg: CacheConfig, tree_core: str, seed: int) -> None:
        self.cfg = cfg
        self.cache, self.alloc, self.table = kit.build(cfg, tree_core_backend=tree_core)
        self.linker = kit.linkers[-1]
        self._rng = random.Random(seed)
        self._ids: list[int] = []  # of the sequence that is inserted
        self._known: list[list[int]] = []
        self._held: list[tuple[int, Any]] = []
        self._seen = 0
        self.loaded = 0
        kv = self.alloc.get_kvcache()
        self._full = _buffers(getattr(kv, "full_kv_pool", kv))
        self._window = _buffers(kv.swa_kv_pool) if cfg.has_swa else []
        self._states: list[torch.Tensor] = []
        if cfg.has_mamba:
            states = self.table.mamba_pool.mamba_cache
            self._states = [
                _bytes(layer) for state in (states.temporal, *states.conv) for layer in state
            ]
        self._all_free = self.free()

    def free(self) -> dict[str, int]:
        found = {"rows": len(self.table.free_slots)}
        if self.cfg.has_swa:
            found["full"] = self.alloc.full_attn_allocator.available_size()
            found["window"] = self.alloc.swa_attn_allocator.available_size()
        else:
            found["full"] = self.alloc.available_size()
        if self.cfg.has_mamba:
            found["states"] = self.table.mamba_allocator.available_size()
        return found

    # --- bytes

    def _prefixes(self, ids: list[int]) -> torch.Tensor:
        """A hash of the tokens up to each."""
        prefix, h = array("q"), 0
        for token in ids:
            h = (h * 1_000_003 + token) % (1 << 20)
            prefix.append(h % 251)
        return torch.tensor(prefix)

    def _put(self, buffers: list[torch.Tensor], slots: torch.Tensor, prefix: torch.Tensor) -> None:
        for number, buffer in enumerate(buffers):
            buffer[slots] = _rows(prefix, buffer.shape[1], number)

    def _check(
        self, buffers: list[torch.Tensor], slots: torch.Tensor, prefix: torch.Tensor
    ) -> None:
        for number, buffer in enumerate(buffers):
            assert torch.equal(buffer[slots], _rows(prefix, buffer.shape[1], number))

    # --- the kit's steps, with KV in what they allocate

    def _alloc(self, allocator: Any, need_size: int) -> torch.Tensor:
        slots = super()._alloc(allocator, need_size)
        prefix = self._prefixes(self._ids)
        self._put(self._full, slots, prefix)
        if self._window:
            self._put(self._window, allocator.full_to_swa_index_mapping[slots], prefix)
        return slots

    def _make_req(self, req_to_token_pool: Any) -> Any:
        self._req = super()._make_req(req_to_token_pool)
        if self.cfg.has_mamba:
            slot = self._req.kv.mamba_pool_idx.view(1)
            self._put(self._states, slot, self._prefixes(self._ids)[-1:])
        return self._req

    def _drop(self, req: Any, *, state_too: bool = True) -> None:
        """A request is over; its state stays where the tree took it."""
        if self.cfg.has_mamba:
            slots = [req.kv.mamba_pool_idx.view(1)] if state_too else []
            if req.kv.mamba_ping_pong_track_buffer is not None:
                slots.append(req.kv.mamba_ping_pong_track_buffer)
            if slots:
                self.table.mamba_allocator.free(torch.cat(slots))
            req.kv.mamba_pool_idx = req.kv.mamba_ping_pong_track_buffer = None
        self.table.free(req)

    def _room(self, tokens: int) -> bool:
        """Whether there is room for a sequence and a request, once the tree has given some."""

        def short() -> list[int]:
            free = self.free()
            wants = (("full", tokens), ("window", tokens), ("states", 4))
            return [max(0, want - free.get(name, want)) for name, want in wants]

        if any(missing := short()):
            full, window, states = missing
            self.cache.evict(EvictParams(num_tokens=full, swa_num_tokens=window, mamba_num=states))
        return not any(short())

    # --- steps

    def run(self, steps: int) -> None:
        """Every step of it, in random order; some more often."""
        weighted: list[tuple[Callable[[], None], int]] = [
            (self.insert, 6),
            (self.ask, 6),
            (self.evict, 3),
            (self.hold, 2),
            (self.let_go, 2),
            (self.settle, 2),
            (self.evict_all, 1),
            (self.flush, 1),
        ]
        chosen, weights = zip(*weighted, strict=True)
        for step in self._rng.choices(chosen, weights, k=steps):
            step()
            self.cache.sanity_check()

    def sequence(self) -> list[int]:
        """A new one, or one that leaves a known one at some page."""
        page, rng = self.cfg.page_size, self._rng
        most = min(self.cfg.kv_size // 3, max(MOST_TOKENS, 4 * page)) // page
        self._seen += 1
        base: list[int] = []
        if self._known and rng.random() < 0.7:
            base = rng.choice(self._known)
            base = base[: rng.randrange(1, len(base) // page + 1) * page]
        more = rng.randrange(1, most - 1)
        return (base + self._make_seq(10_000 * self._seen, more))[: most * page]

    def insert(self) -> None:
        ids = self.sequence()
        if self._room(len(ids)):
            self.compute(ids)

    def compute(self, ids: list[int]) -> None:
        self._ids = ids
        result = self._insert(self.cache, self.alloc, self.table, self._ids)
        self._known.append(self._ids)
        if self.cfg.has_mamba:
            self._drop(self._req, state_too=result.mamba_exist)

    def ask(self) -> None:
        """A request matches, loads what the tree lacks, and leaves it to the tree or dies."""
        if not self._known or not self._room(0):
            return
        aborted = self._rng.random() < 0.1
        self.serve(self._rng.choice(self._known), aborted=aborted)

    def serve(self, ids: list[int], *, aborted: bool = False) -> None:
        self._ids = ids
        req = self._make_req(self.table)
        match = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids)), req=req))
        self._apply_match_to_req(req, match)
        lock = self.cache.lock(req.last_node)
        device = match.device_prefix_len
        path = self.cache.path_device_indices(req.last_node)[:device]
        assert len(path) == device
        self._check_prefix(ids, path, 0)
        if aborted:  # while it waits
            self.cache.linker.release_request(req.rid)
            self.cache.unlock(lock)
            self._drop(req)
            return
        loaded = self._load(req, match.host_hit_length)
        have = torch.cat([path, loaded])
        self._check_prefix(ids, have, device)
        state_too = True
        if len(loaded) and self._rng.random() < 0.8:
            state_too = self._adopt(req, ids[: len(have)], have, device)
        elif len(loaded):
            self._free(req, loaded, device)
        self.cache.unlock(lock)
        self._drop(req, state_too=state_too)

    def _load(self, req: Any, hit: int) -> torch.Tensor:
        nothing = torch.empty(0, dtype=torch.int64)
        if not hit:
            return nothing
        loaded, _ = self.cache.init_load_back(
            InitLoadBackParams(best_match_node=req.best_match_node, host_hit_length=hit, req=req)
        )
        if not loaded:  # no room for it
            assert self.cache.ready_to_load_host_cache() == -1
            return nothing
        assert loaded == hit
        self.loaded += loaded
        self.linker.layer_done_counter.set_consumer(self.cache.ready_to_load_host_cache())
        for layer in range(self.linker.layer_done_counter.num_layers):
            self.linker.layer_done_counter.wait_until(layer)
        slots = self.cache.linker.private_load_indices[req.rid]
        if self.cfg.has_mamba:
            end = self._prefixes(self._ids[: req.prefix_len + loaded])[-1:]
            self._check(self._states, req.kv.mamba_pool_idx.view(1), end)
        assert self.cache.linker.finish_loads() == []
        return slots

    def _adopt(self, req: Any, ids: list[int], slots: torch.Tensor, device: int) -> bool:
        """The tree takes what was loaded; whether the request's state is still its own."""
        params = InsertParams(key=RadixKey(array("q", ids)), value=slots, prev_prefix_len=device)
        if self.cfg.has_swa:
            params.set_evicted_seqlen(SWA, req.kv.get_evicted_seqlen(SWA))
        if self.cfg.has_mamba:
            params.mamba_value = req.kv.mamba_pool_idx.view(1)
        return self.cache.insert(params).mamba_exist

    def _free(self, req: Any, loaded: torch.Tensor, device: int) -> None:
        """As the scheduler frees what a request holds: what slid out of the window has no peer."""
        if not self.cfg.has_swa:
            self.alloc.free(loaded)
            return
        self.alloc.free_swa(loaded[max(0, req.kv.get_evicted_seqlen(SWA) - device) :])
        self.alloc.free_full(loaded)

    def _check_prefix(self, ids: list[int], slots: torch.Tensor, start: int) -> None:
        """Full attention from `start` on, and the window at the end."""
        prefix = self._prefixes(ids[: len(slots)])
        self._check(self._full, slots[start:], prefix[start:])
        if self._window:
            page = self.cfg.page_size
            first = max(0, len(slots) - self.cfg.sliding_window_size) // page * page
            swa = self.alloc.full_to_swa_index_mapping[slots[first:]]
            assert bool((swa > 0).all()), "a page of the window is nowhere"
            self._check(self._window, swa, prefix[first:])

    def evict(self) -> None:
        upto = self.cfg.kv_size // 2
        self.cache.evict(
            EvictParams(
                num_tokens=self._rng.randrange(upto),
                swa_num_tokens=self._rng.randrange(upto) if self.cfg.has_swa else 0,
                mamba_num=self._rng.randrange(4) if self.cfg.has_mamba else 0,
            )
        )

    def evict_all(self) -> None:
        """All that nobody holds."""
        self.settle()
        size = self.cfg.kv_size
        self.cache.evict(
            EvictParams(
                num_tokens=size,
                swa_num_tokens=size if self.cfg.has_swa else 0,
                mamba_num=self.cfg.mamba_cache_size if self.cfg.has_mamba else 0,
            )
        )

    def hold(self) -> None:
        """As a request that runs."""
        if self._known and len(self._held) < 3:
            ids = self._rng.choice(self._known)
            node = fixtures.match_prefix(self.cache, ids).last_device_node
            if not self.cache.is_root(node):
                self._held.append((node, self.cache.inc_lock_ref(node).to_dec_params()))

    def let_go(self) -> None:
        if self._held:
            self.cache.dec_lock_ref(*self._held.pop(self._rng.randrange(len(self._held))))

    def settle(self) -> None:
        settle(self.cache)
        for lane in self.linker.lanes:
            lane.store.ram.check()

    def flush(self) -> None:
        """As SGLang does, in the middle of offloads too, but with no request."""
        while self._held:
            self.let_go()
        self.cache.reset()
        self.alloc.clear()
        self.table.clear()
        for buffer in (*self._full, *self._window, *self._states):
            buffer.zero_()
        assert self.free() == self._all_free

    def restore(self) -> None:
        """After all that: a prompt comes back whole."""
        self.flush()
        ids = self._make_seq(1, max(1, 64 // self.cfg.page_size))
        self.compute(ids)
        self.settle()
        self.flush()
        before = self.loaded
        self.serve(ids)
        assert self.loaded - before == len(ids)

    def end(self) -> None:
        """Nothing is left behind, neither in SGLang nor in lmc."""
        while self._held:
            self.let_go()
        self.settle()
        cache = self.cache
        locked = (
            cache.full_protected_size(),
            cache.swa_protected_size(),
            cache.mamba_protected_size(),
        )
        assert locked == (0, 0, 0)
        self.evict_all()
        cache.sanity_check()
        assert self.free() == self._all_free
        assert not cache.linker.private_load_indices
        assert not cache.linker.inflight_load_rids
        assert not self.linker.num_completed_offloads()
        for lane in self.linker.lanes:
            gauges = lane.store.gauges()
            assert gauges["ram.idle_slots"] + gauges["ram.free_slots"] == gauges["ram.slots"]
