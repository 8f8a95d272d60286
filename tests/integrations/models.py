"""The harness with the pools of other models: latent attention, quantized KV with scales, an
indexer, sliding windows, recurrent states, draft models.

Every buffer of every pool is listed here, not asked of lmc: what it leaves out are wrong bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache import memory_pool as pools
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from tests.integrations.harness import Harness, Request

if TYPE_CHECKING:
    from array import array

FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
LAYERS, HEADS, DIM = 3, 2, 32
WINDOW = 160
STATES = 40


@dataclass(frozen=True)
class Rows:
    """A buffer: a row is a slot, or with `page` > 1 that many slots."""

    buffer: torch.Tensor
    number: int
    page: int = 1

    def values(self, prefix: torch.Tensor) -> torch.Tensor:
        """What rows hold where the tokens so far hash to `prefix`."""
        width = self.buffer[0].numel() * self.buffer.element_size()
        lane = torch.arange(width)
        return ((prefix.view(-1, 1) + 31 * self.number + lane) % 251).to(torch.uint8)

    @property
    def bytes(self) -> torch.Tensor:
        return self.buffer.view(self.buffer.shape[0], -1).view(torch.uint8)

    def at(self, slots: torch.Tensor, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of slots, and what they hold."""
        if self.page == 1:
            return slots, self.values(prefix)
        return slots[:: self.page] // self.page, self.values(prefix[self.page - 1 :: self.page])

    def put(self, slots: torch.Tensor, prefix: torch.Tensor) -> None:
        rows, values = self.at(slots, prefix)
        self.bytes[rows] = values

    def check(self, slots: torch.Tensor, prefix: torch.Tensor) -> None:
        rows, values = self.at(slots, prefix)
        assert torch.equal(self.bytes[rows], values), f"buffer {self.number}"


def mha(size: int, page: int, kind: type = pools.MHATokenToKVPool, layers: int = LAYERS) -> Any:
    dtype = torch.float32 if kind is pools.MHATokenToKVPool else torch.float8_e4m3fn
    return kind(
        size=size,
        page_size=page,
        dtype=dtype,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )


def mla(size: int, page: int, kind: type = pools.MLATokenToKVPool, layers: int = LAYERS) -> Any:
    more = {}
    if kind is pools.DSATokenToKVPool:
        more = {"index_head_dim": 128, "kv_cache_dim": 48}
    return kind(
        size=size,
        page_size=page,
        dtype=torch.float32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
        **more,
    )


class ModelHarness(Harness):
    """Harness of one of MODELS: requests as there, with windows and states where it has them."""

    def __init__(self, model: str, *arguments: Any, **more: Any) -> None:
        self.model = model
        self.window = WINDOW if "swa" in model else 0
        self.states: list[Rows] = []
        self.components = (
            FULL,
            *((SWA,) if self.window else ()),
            *((MAMBA,) if "mamba" in model else ()),
        )
        self.rows: list[Rows] = []
        self.window_rows: list[Rows] = []
        self.drafts: tuple[Any, ...] = ()
        super().__init__(*arguments, **more)

    # --- what is served

    def make_pools(self, page: int, size: int, layout: str) -> None:
        model = self.model
        if "draft" in model:
            self.drafts = (mha(size, page, layers=1),)
        if self.window:
            kind = pools.MLATokenToKVPool if "mla" in model else pools.MHATokenToKVPool
            shared = {"page_size": page, "enable_memory_saver": False, "device": "cpu"}
            latent = {**shared, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
            kwargs = (
                {"full_kv_pool_kwargs": latent, "swa_kv_pool_kwargs": latent}
                if "mla" in model
                else {}
            )
            self.pool = SWAKVPool(
                size=size,
                size_swa=size,
                page_size=page,
                dtype=torch.float32,
                head_num=HEADS,
                head_dim=DIM,
                swa_attention_layer_ids=[0, 2, 3],
                full_attention_layer_ids=[1, 4],
                device="cpu",
                token_to_kv_pool_class=kind,
                **kwargs,
            )
            self.alloc = SWATokenToKVPoolAllocator(
                size, size, page, torch.float32, "cpu", self.pool, need_sort=False
            )
            self._list(self.pool.full_kv_pool, self.rows, page)
            self._list(self.pool.swa_kv_pool, self.window_rows, page)
        else:
            self.pool = self._full(size, page)
            kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
            pages = () if page == 1 else (page,)
            self.alloc = kind(size, *pages, torch.float32, "cpu", self.pool, need_sort=False)
            self._list(getattr(self.pool, "full_kv_pool", self.pool), self.rows, page)
        for draft in self.drafts:
            self._list(draft, self.rows, page)

    def _full(self, size: int, page: int) -> Any:
        if "mamba" in self.model:
            latent = (
                {"use_mla": True, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
                if "mla" in self.model
                else {}
            )
            return pools.HybridLinearKVPool(
                size=size,
                dtype=torch.float32,
                page_size=page,
                head_num=HEADS,
                head_dim=DIM,
                full_attention_layer_ids=[1, 4],
                device="cpu",
                mamba_pool=None,
                **latent,
            )
        kinds = {
            "mla": (mla, pools.MLATokenToKVPool),
            "mla-fp4": (mla, pools.MLATokenToKVPoolFP4),
            "dsa": (mla, pools.DSATokenToKVPool),
            "mha-fp4": (mha, pools.MHATokenToKVPoolFP4),
            "mha-mxfp8": (mha, pools.MHATokenToKVPoolMXFP8),
        }
        make, kind = kinds.get(self.model, (mha, pools.MHATokenToKVPool))
        return make(size, page, kind)

    def make_table(self, size: int) -> Any:
        if MAMBA not in self.components:
            return super().make_table(size)
        shape = Mamba2StateShape.create(
            tp_world_size=1,
            intermediate_size=64,
            n_groups=1,
            num_heads=2,
            head_dim=16,
            state_size=16,
            conv_kernel=4,
        )
        layers = [0, 2, 3] if not self.window else [5, 6]
        self.table = pools.HybridReqToTokenPool(
            size=8,
            mamba_size=STATES,
            mamba_spec_state_size=8,
            max_context_len=size,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=shape, layers=layers),
            mamba_layer_ids=layers,
            enable_mamba_extra_buffer=self.page > 1,
            speculative_num_draft_tokens=3,
        )
        cache = self.table.mamba_pool.mamba_cache
        for state in (cache.temporal, *cache.conv):
            for of_layer in state:
                self.states.append(Rows(of_layer, 1000 + len(self.states)))
        return self.table

    def params_of(self) -> dict[str, object]:
        return {
            "sliding_window_size": self.window or None,
            "enable_mamba_extra_buffer": MAMBA in self.components and self.page > 1,
            "sidecar_draft_device_pools": self.drafts,
            "is_eagle": "eagle" in self.model,
        }

    def _list(self, pool: Any, rows: list[Rows], page: int) -> None:
        for name in ("k_buffer", "v_buffer", "kv_buffer", "kv_scale_buffer"):
            for buffer in getattr(pool, name, None) or ():
                rows.append(Rows(buffer, 100 * len(self.window_rows) + len(rows)))
        for name in ("k_scale_buffer", "v_scale_buffer"):
            for buffer in getattr(pool, name, None) or ():
                per_row = page if buffer.shape[0] == pool.size // page + 1 else 1
                rows.append(Rows(buffer, len(rows), per_row))
        for buffer in getattr(pool, "index_k_with_scale_buffer", None) or ():
            rows.append(Rows(buffer, len(rows), page))

    # --- bytes

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [row.bytes for row in (*self.rows, *self.window_rows, *self.states)]

    def prefixes(self, ids: array) -> torch.Tensor:
        """A hash of the tokens up to each; in a tree of bigrams, of the one behind it too."""
        prefix, h = torch.empty(len(ids), dtype=torch.int64), 0
        for i, token in enumerate(ids):
            h = (h * 1_000_003 + token) % (1 << 20)
            prefix[i] = h
        return prefix

    def window_slots(self, slots: torch.Tensor) -> torch.Tensor:
        return self.alloc.full_to_swa_index_mapping[slots]

    def compute(self, ids: array, start: int, slots: torch.Tensor) -> None:
        prefix = self.prefixes(ids)[start : start + len(slots)]
        for row in self.rows:
            row.put(slots, prefix)
        for row in self.window_rows:
            row.put(self.window_slots(slots), prefix)

    def check(self, ids: array, slots: torch.Tensor, start: int = 0) -> None:
        prefix = self.prefixes(ids)[start : start + len(slots)]
        for row in self.rows:
            row.check(slots, prefix)

    def check_window(self, ids: array, slots: torch.Tensor) -> None:
        """The end of a prefix, of which `slots` are all."""
        first = max(0, len(slots) - self.window) // self.page * self.page
        swa = self.window_slots(slots[first:])
        assert bool((swa > 0).all()), "a page of the window is nowhere"
        prefix = self.prefixes(ids)[first : len(slots)]
        for row in self.window_rows:
            row.check(swa, prefix)

    def check_state(self, ids: array, length: int, slot: torch.Tensor) -> None:
        prefix = self.prefixes(ids)[length - 1 : length]
        for row in self.states:
            row.check(slot.view(1), prefix)

    # --- the scheduler's part

    def arrive(self, ids: array, **more: Any) -> Request:
        return super().arrive(ids, kv=ReqKvInfo(), **more)

    def run(self, ids: array, **more: Any) -> int:
        req = self.arrive(ids, **more)
        match = self.admit(req)
        device, host = match.device_prefix_len, match.host_hit_length
        path = self.path(match)
        self.check(ids, path)
        loaded = self.load(req, match) if host else path[:0]
        self.check(ids, loaded, device)
        have = device + host
        if self.window:
            self.check_window(ids, torch.cat([path, loaded]))
        if host and MAMBA in self.components:
            self.check_state(ids, have, req.kv.mamba_pool_idx)
        keyed = self.whole(ids)
        rest = self.alloc_tokens(len(keyed) - have)
        self.compute(ids, have, rest)
        key = {"extra_key": more.get("extra_key"), "cache_salt": more.get("cache_salt")}
        self.insert(ids, torch.cat([path, loaded, rest]), device, req=req, **key)
        return have

    def path(self, match: Any) -> torch.Tensor:
        length = match.device_prefix_len
        if not length:
            return torch.empty(0, dtype=torch.int64)
        return self.cache.path_device_indices(match.last_device_node)[:length]

    def whole(self, ids: array) -> array:
        if self.params.is_eagle:  # n + 1 tokens make n bigrams
            return ids[: (len(ids) - 1) // self.page * self.page]
        return super().whole(ids)

    def insert(
        self, ids: array, slots: torch.Tensor, prev: int = 0, req: Any = None, **key: Any
    ) -> None:
        whole = self.whole(ids)
        length = len(whole)
        tokens = ids[: length + 1] if self.params.is_eagle else whole
        params = InsertParams(key=RadixKey(tokens, **key), value=slots, prev_prefix_len=prev)
        if self.window and req is not None:
            params.set_evicted_seqlen(SWA, req.kv.get_evicted_seqlen(SWA))
        if MAMBA in self.components and length:
            slot = self.alloc_state()
            for row in self.states:
                row.put(slot, self.prefixes(ids)[length - 1 : length])
            params.mamba_value = slot
        if length:
            result = self.cache.insert(params)
            if MAMBA in self.components and result.mamba_exist:
                self.table.mamba_allocator.free(params.mamba_value)
        if req is not None and req.kv.holds_mamba:
            self.table.mamba_allocator.free(req.kv.mamba_pool_idx.view(1))
            req.kv.mamba_pool_idx = None

    def alloc_state(self) -> torch.Tensor:
        slot = self.table.mamba_allocator.alloc(1)
        if slot is None:
            self.cache.evict(EvictParams(num_tokens=0, mamba_num=1))
            slot = self.table.mamba_allocator.alloc(1)
        return slot

    def alloc_tokens(self, n: int) -> torch.Tensor:
        if not self.window or not n:
            return super().alloc_tokens(n)
        full, swa = self.alloc.full_attn_allocator, self.alloc.swa_attn_allocator
        short = n - full.available_size(), n - swa.available_size()
        if max(short) > 0:
            self.cache.evict(
                EvictParams(num_tokens=max(0, short[0]), swa_num_tokens=max(0, short[1]))
            )
        slots = full.alloc(n)
        self.alloc.full_to_swa_index_mapping[slots] = swa.alloc(n)
        return slots

    def flush(self) -> None:
        self.settle()
        self.cache.reset()
        self.alloc.clear()
        if MAMBA in self.components:
            self.table.clear()
        for buffer in self.buffers:
            buffer.zero_()
