"""The harness with the pools of other models: latent attention, quantized KV with scales, an
indexer, sliding windows, recurrent states, draft models.

Every buffer of every pool is listed here, not asked of lmc: what it leaves out are wrong bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache import memory_pool as pools
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from tests.integrations.harness import DRAFT, Harness, Request, Rows, Turn

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence

FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
LAYERS, HEADS, DIM = 3, 2, 32
WINDOW_LAYERS, FULL_LAYERS = [0, 2, 3], [1, 4]
WINDOW = 160
STATES = 40


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
        self.state_layers = WINDOW_LAYERS if not self.window else [5, 6]
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
                swa_attention_layer_ids=WINDOW_LAYERS,
                full_attention_layer_ids=FULL_LAYERS,
                device="cpu",
                token_to_kv_pool_class=kind,
                **kwargs,
            )
            self.alloc = SWATokenToKVPoolAllocator(
                size, size, page, torch.float32, "cpu", self.pool, need_sort=False
            )
            self._list(self.pool.full_kv_pool, self.rows, page, FULL_LAYERS)
            self._list(self.pool.swa_kv_pool, self.window_rows, page, WINDOW_LAYERS)
        else:
            self.pool = self._full(size, page)
            kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
            pages = () if page == 1 else (page,)
            self.alloc = kind(size, *pages, torch.float32, "cpu", self.pool, need_sort=False)
            if MAMBA in self.components:
                self._list(self.pool.full_kv_pool, self.rows, page, FULL_LAYERS)
            else:
                self._list(self.pool, self.rows, page, range(LAYERS))
        for draft in self.drafts:
            self._list(draft, self.rows, page, [DRAFT])

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
                full_attention_layer_ids=FULL_LAYERS,
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

    @property
    def allocators(self) -> list[Any]:
        if self.window:
            found = [self.alloc.full_attn_allocator, self.alloc.swa_attn_allocator]
        else:
            found = [self.alloc]
        return [*found, self.table.mamba_allocator] if self.states else found

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
        self.table = pools.HybridReqToTokenPool(
            size=8,
            mamba_size=STATES,
            mamba_spec_state_size=8,
            max_context_len=size,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=shape, layers=self.state_layers),
            mamba_layer_ids=self.state_layers,
            enable_mamba_extra_buffer=self.page > 1,
            speculative_num_draft_tokens=3,
        )
        cache = self.table.mamba_pool.mamba_cache
        for state in (cache.temporal, *cache.conv):
            for layer, of_layer in zip(self.state_layers, state, strict=True):
                self.states.append(Rows(of_layer, 100 + len(self.states), layer))
        return self.table

    def params_of(self) -> dict[str, object]:
        return {
            "sliding_window_size": self.window or None,
            "enable_mamba_extra_buffer": MAMBA in self.components and self.page > 1,
            "sidecar_draft_device_pools": self.drafts,
            "is_eagle": "eagle" in self.model,
        }

    def _list(self, pool: Any, to: list[Rows], page: int, layers: Sequence[int]) -> None:
        names = ("k_buffer", "v_buffer", "kv_buffer", "kv_scale_buffer", "k_scale_buffer")
        for name in (*names, "v_scale_buffer", "index_k_with_scale_buffer"):
            for layer, buffer in zip(layers, getattr(pool, name, None) or (), strict=False):
                of_pages = buffer.shape[0] == pool.size // page + 1
                number = len(self.rows) + len(self.window_rows)
                to.append(Rows(buffer, number, layer, page if of_pages else 1))

    # --- bytes

    @property
    def all_rows(self) -> list[Rows]:
        return [*self.rows, *self.window_rows, *self.states]

    def window_slots(self, slots: torch.Tensor) -> torch.Tensor:
        return self.alloc.full_to_swa_index_mapping[slots]

    def reads(self, turn: Turn) -> list[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """The prefix, the end of it that a window is, and the state it ends in."""
        found, have = super().reads(turn), len(turn.prefix)
        hashes = self.hashes(turn.ids)[:have]
        first = max(0, have - self.window) // self.page * self.page
        if self.window:
            slots = self.window_slots(turn.prefix[first:])
            assert bool((slots > 0).all()), "a page of the window is nowhere"
            found += [(rows, slots, hashes[first:]) for rows in self.window_rows]
        return [*found, *((rows, turn.state, hashes[-1:]) for rows in self.states)]

    def writes(
        self, turn: Turn, rest: torch.Tensor
    ) -> list[tuple[Rows, torch.Tensor, torch.Tensor]]:
        found, end = super().writes(turn, rest), len(turn.prefix) + len(rest)
        hashes = self.hashes(turn.ids)[end - len(rest) : end]
        if self.window:
            slots = self.window_slots(rest)
            found += [(rows, slots, hashes) for rows in self.window_rows]
        hashes = self.hashes(turn.ids)[:end][-1:]
        return [*found, *((rows, turn.made, hashes) for rows in self.states)]

    def wait_for(self, layer: int) -> None:
        if self.states and layer in self.state_layers:
            self.table.mamba2_layer_index(layer)
        else:
            super().wait_for(layer)

    # --- the scheduler's part

    def arrive(self, ids: array, **more: Any) -> Request:
        return super().arrive(ids, kv=ReqKvInfo(), **more)

    def load(self, req: Request, match: Any) -> Turn:
        turn = super().load(req, match)
        if req.kv.holds_mamba:
            turn.state = req.kv.mamba_pool_idx.view(1)
        elif self.states and len(turn.path):
            turn.state = self.cache.tree_core.get_component_device_value(
                match.best_match_node, MAMBA
            )
        return turn

    def forward(self, turn: Turn, rest: torch.Tensor) -> None:
        if self.states and len(self.whole(turn.ids)):
            turn.made = self.alloc_state()
        super().forward(turn, rest)

    def keep(self, turn: Turn, rest: torch.Tensor, **params: Any) -> Any:
        if self.window:
            params["component_evicted_seqlens"] = {SWA: turn.req.kv.get_evicted_seqlen(SWA)}
        if self.states:
            params["mamba_value"] = turn.made
        result = super().keep(turn, rest, **params)
        if self.states and result.mamba_exist:
            self.table.mamba_allocator.free(turn.made)
        self._free_state(turn)
        return result

    def drop(self, turn: Turn) -> None:
        super().drop(turn)
        self._free_state(turn)

    def _free_state(self, turn: Turn) -> None:
        """Its own, into which a state was loaded."""
        if turn.req.kv.holds_mamba:
            self.table.mamba_allocator.free(turn.req.kv.mamba_pool_idx.view(1))
            turn.req.kv.mamba_pool_idx = None

    def whole(self, ids: array) -> array:
        if self.params.is_eagle:  # n + 1 tokens make n bigrams
            return ids[: (len(ids) - 1) // self.page * self.page]
        return super().whole(ids)

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

    def reset(self) -> None:
        super().reset()
        if self.states:
            self.table.clear()
