"""The storage below HiCache, driven by SGLang's own radix tree, controller and threads: what was
computed once comes back from it byte for byte. On a CPU two things are not SGLang's: its host pool
is not pinned, and the copies between host and device are torch's.
"""

from __future__ import annotations

import atexit
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.pool_host import mha, mla
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_context, get_parallel

from lmc_sglang import compat
from lmc_sglang.hicache import LmcHiCache
from tests.integrations.fixtures import SERVER_ARGS
from tests.integrations.harness import tokens

if TYPE_CHECKING:
    from array import array

PAGE, LAYERS, SIZE = 64, 4, 2048
EXTRA = {
    "backend_name": "lmc",
    "module_path": "lmc_sglang.hicache",
    "class_name": "LmcHiCache",
    "interface_v1": 1,
    "prefetch_threshold": PAGE,
}


class Tree:
    """SGLang's radix tree with HiCache and lmc below it, and the scheduler's part by hand."""

    def __init__(self, kind: str, server_args) -> None:
        common = {
            "size": SIZE,
            "page_size": PAGE,
            "dtype": torch.float32,
            "layer_num": LAYERS,
            "device": "cpu",
            "enable_memory_saver": False,
        }
        if kind == "mla":
            self.pool = MLATokenToKVPool(kv_lora_rank=48, qk_rope_head_dim=16, **common)
            self.buffers = self.pool.kv_buffer
        else:
            self.pool = MHATokenToKVPool(head_num=2, head_dim=32, **common)
            self.buffers = [*self.pool.k_buffer, *self.pool.v_buffer]
        self.alloc = PagedTokenToKVPoolAllocator(
            SIZE, PAGE, torch.float32, "cpu", self.pool, need_sort=False
        )
        table = ReqToTokenPool(
            size=8, max_context_len=SIZE, device="cpu", enable_memory_saver=False
        )
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=table,
            token_to_kv_pool_allocator=self.alloc,
            page_size=PAGE,
        )
        params.tree_components = (ComponentType.FULL,)
        self.cache = UnifiedRadixCache(params)
        self.cache.init_hicache(server_args, params)
        atexit.unregister(self.cache.shutdown)
        self.cache.load_back_threshold = 0
        self.controller = self.cache.cache_controller
        self.storage = self.controller.storage_backend
        self._rid = 0

    def expected(self, ids: array) -> list[torch.Tensor]:
        """KV as a function of the tokens so far."""
        prefix, h = torch.empty(len(ids)), 0
        for i, token in enumerate(ids):
            h = (h * 1_000_003 + token) % (1 << 20)
            prefix[i] = h
        lane = torch.arange(64) / 64
        shape = (-1, *self.buffers[0].shape[1:])
        rows = [prefix.view(-1, 1) + 7 * n + lane for n in range(len(self.buffers))]
        return [row.reshape(shape) for row in rows]

    def step_until(self, done) -> None:
        while not done():
            self.cache.check_hicache_events()
            time.sleep(0.001)

    def prefetch(self, ids: array, match) -> None:
        """As the scheduler does when a request arrives, from the end of what tree and host have."""
        handle = CacheRequestHandle(f"r{self._rid}", 0)
        have = match.device_prefix_len + match.host_hit_length
        node = match.last_host_node if have else self.cache.root_node_handle()
        keys = self.cache.get_prefix_hash_values(node) if have else None
        last = self.cache.get_last_hash_value(node) if have else None
        self.cache.prefetch_from_storage(
            handle, node, ids[have:], last, keys, matched_prefix_tokens=list(ids[:have])
        )
        self.step_until(lambda: self.cache.check_prefetch_progress(handle))

    def run(self, ids: array) -> tuple[int, int]:
        """A whole request: tokens found on the device, and beyond it. Checks all their bytes."""
        self._rid += 1
        key = RadixKey(ids[: (len(ids) - 1) // PAGE * PAGE])
        req = SimpleNamespace(
            rid=f"r{self._rid}",
            kv=SimpleNamespace(mamba_pool_idx=None),
            session=None,
            swa_branching_seqlen=None,
            swa_host_hit_length=0,
            mamba_host_hit_length=0,
        )
        asked = MatchPrefixParams(key=key, req=req)
        self.prefetch(key.token_ids, self.cache.match_prefix(asked))
        match = self.cache.match_prefix(asked)
        device, host = match.device_prefix_len, match.host_hit_length
        req.last_node, node = match.last_device_node, match.last_device_node
        if host:
            loaded, node = self.cache.init_load_back(
                InitLoadBackParams(
                    best_match_node=match.best_match_node, host_hit_length=host, req=req
                )
            )
            assert loaded == host
            self.cache.ready_to_load_host_cache()
            self.step_until(lambda: not self.cache.ongoing_load_back)
        path = self.cache.path_device_indices(node)[: device + host]
        expected = self.expected(ids)
        for buffer, want in zip(self.buffers, expected, strict=True):
            assert torch.equal(buffer[path], want[: len(path)])
        self.compute(ids, path, expected)
        return device, host

    def compute(self, ids: array, path: torch.Tensor, expected: list[torch.Tensor]) -> None:
        whole, have = len(ids) // PAGE * PAGE, len(path)
        if whole > have:
            slots = self.alloc.alloc(whole - have)
            for buffer, want in zip(self.buffers, expected, strict=True):
                buffer[slots] = want[have:whole]
            path = torch.cat([path, slots])
        self.cache.insert(InsertParams(key=RadixKey(ids[:whole]), value=path, prev_prefix_len=have))
        self.step_until(
            lambda: not self.cache.ongoing_write_through and not self.cache.ongoing_backup
        )

    def flush(self) -> None:
        """Device and host forget everything."""
        self.cache.reset()
        self.alloc.clear()
        for buffer in (*self.buffers, self.controller.storage_host_pool.kv_buffer):
            buffer.zero_()

    def close(self) -> None:
        self.cache.shutdown()
        self.cache.release_host_resources()


def copy_rows(src_layers, dst_layers, src_indices, dst_indices, page_size):
    """What SGLang's `transfer_kv_direct` does, which comes with its GPU kernels."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def pages_to_rows(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """`transfer_kv_per_layer_direct_pf_lf`."""
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        page, at = src_indices // page_size, src_indices % page_size
        target[dst_indices] = source[page, layer_id, at]


def rows_to_pages(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """`transfer_kv_all_layer_direct_lf_pf`."""
    page, at = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for n, source in enumerate(src_ptrs):
        dst_ptrs[n // layers][page, n % layers, at] = source[src_indices]


@pytest.fixture
def tree(model_folder, monkeypatch):
    opened, undo = [], []
    for module in (mha, mla):
        patch = {
            "transfer_kv_direct": copy_rows,
            "transfer_kv_per_layer_direct_pf_lf": pages_to_rows,
            "transfer_kv_all_layer_direct_lf_pf": rows_to_pages,
        }
        for name, function in patch.items():
            monkeypatch.setattr(module, name, function, raising=False)
    real = {"mha": hybrid_pool_assembler.get_mha_host_pool_cls, "mla": mla.MLATokenToKVPoolHost}

    def unpinned(cls):
        return lambda *args, **kwargs: cls(*args, **{**kwargs, "pin_memory": False})

    monkeypatch.setattr(
        hybrid_pool_assembler, "get_mha_host_pool_cls", lambda info: unpinned(real["mha"](info))
    )
    monkeypatch.setattr(hybrid_pool_assembler, "MLATokenToKVPoolHost", unpinned(real["mla"]))

    def build(kind="mha", layout="layer_first", **settings):
        monkeypatch.setenv("LMC_RAM_GB", "0.05")
        monkeypatch.setenv("LMC_STAGE_WAIT_MS", "5000")
        monkeypatch.delenv("LMC_TIERS", raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        override = get_context().override_server_args(
            device="cpu",
            page_size=PAGE,
            enable_hierarchical_cache=True,
            hicache_io_backend="direct",
            hicache_mem_layout=layout,
            hicache_write_policy="write_through",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(EXTRA),
            hicache_storage_prefetch_policy="wait_complete",
        )
        parallel = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        args = override.install()
        parallel.__enter__()
        undo.extend((override.restore, lambda: parallel.__exit__(None, None, None)))
        known = msgspec.structs.replace(SERVER_ARGS, model_path=str(model_folder))
        monkeypatch.setattr(compat, "server_args", lambda: known)
        opened.append(Tree(kind, args))
        return opened[-1]

    yield build
    for one in opened:
        one.close()
    for action in reversed(undo):
        action()


KINDS = [
    (kind, layout) for kind in ("mha", "mla") for layout in ("layer_first", "page_first_direct")
]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_prompts_come_back_after_a_flush_and_after_a_restart(tree, tmp_path, kind, layout):
    first = tree(kind, layout, LMC_TIERS=f"file://{tmp_path}?gb=1")
    assert isinstance(first.storage, LmcHiCache)
    ids = tokens(1, 1000)
    assert first.run(ids) == (0, 0)
    assert first.run(ids) == (960, 0)
    first.flush()
    assert first.run(ids) == (0, 960)
    first.close()
    second = tree(kind, layout, LMC_TIERS=f"file://{tmp_path}?gb=1")
    assert second.run(ids[:700] + tokens(2, 300)) == (0, 640)


def test_what_the_tree_has_lost_the_end_of_comes_back_from_there_on(tree):
    t, ids = tree(), tokens(1, 1400)
    t.run(ids[:500])
    t.run(ids)
    t.flush()
    assert t.run(ids[:500]) == (0, 448)
    assert t.run(ids) == (448, 896)


def test_prompts_that_push_each_other_out(tree):
    """Device and host hold less than all of them."""
    t = tree()
    prompts = [tokens(1, 320) + tokens(seed, 320) for seed in range(2, 14)]
    for ids in prompts + prompts[::-1]:
        t.cache.evict(EvictParams(num_tokens=SIZE - 640))
        t.run(ids)
    t.flush()
    assert t.run(prompts[0]) == (0, 576)


def test_changed_weights_find_nothing_and_keep_nothing_of_the_old(tree):
    t, ids = tree(), tokens(1, 640)
    t.run(ids)
    t.storage.weights_changed()
    t.run(tokens(2, 640))
    t.flush()
    assert t.run(ids) == (0, 0)
    assert t.run(tokens(2, 640)) == (0, 0)
    t.flush()
    assert t.run(ids) == (0, 576)


def test_failures_that_sglang_injects_are_shorter_hits(tree):
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.5),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.002),
    ):
        t = tree()
    for seed in (1, 2, 1, 2, 1, 2, 1, 2):
        t.run(tokens(seed, 640))
        t.flush()
