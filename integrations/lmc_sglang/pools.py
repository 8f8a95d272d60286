"""Describes SGLang's device pools to lmc, or refuses them by name: a layout is never guessed from
shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmc.transfer import PagedPool

SUPPORTED = "MHA/GQA pools (MHATokenToKVPool, layout nhd, no scales, no draft pool) on the CPU"


@dataclass(frozen=True, slots=True)
class DevicePool:
    """A pool as lmc moves it, and what of it belongs into the namespace."""

    pages: PagedPool
    fields: dict[str, str]

    @property
    def num_layers(self) -> int:
        return self.pages.num_layers


def describe(params: Any, components: Any) -> DevicePool:
    """The KV pool behind `params`. Raises ValueError naming the pool and what is supported."""
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    pool = params.token_to_kv_pool_allocator.get_kvcache()
    kind = type(pool).__name__
    others = sorted(str(getattr(c, "name", c)) for c in set(components) - {ComponentType.FULL})
    if others:
        raise ValueError(_refusal(kind, f"state beside full attention: {', '.join(others)}"))
    if (
        params.sidecar_draft_device_pools
        or params.mtp_draft_device_pools
        or params.mtp_draft_mamba_pools
    ):
        raise ValueError(_refusal(kind, "draft pools of speculative decoding"))
    if params.is_eagle:
        raise ValueError(_refusal(kind, "a bigram tree (EAGLE)"))
    if type(pool) is not MHATokenToKVPool:
        raise ValueError(_refusal(kind, "this pool"))
    (info,) = pool.get_device_pool_infos()
    mha = info.buffer_info
    if mha.buffers.layout is not KVBufferLayout.NHD or pool.kv_cache_layout != "nhd":
        raise ValueError(_refusal(kind, f"layout {pool.kv_cache_layout}"))
    if mha.scales is not None or mha.transfer_buffers is not None:
        raise ValueError(_refusal(kind, "scales or relocatable buffers"))
    if mha.device.type != "cpu":
        raise ValueError(_refusal(kind, f"device {mha.device}"))
    planes = [plane for pair in zip(mha.buffers.k, mha.buffers.v, strict=True) for plane in pair]
    fields = {
        "pool": kind,
        "pool_layout": mha.buffers.layout.value,
        "kv_dtype": str(pool.dtype),
        "store_dtype": str(mha.dtype),
        "heads": str(mha.head_num),
        "head_dims": f"{mha.head_dim},{mha.v_head_dim}",
        "layers": ",".join(map(str, info.layer_ids)),
    }
    return DevicePool(PagedPool.from_slots(planes, params.page_size, planes_per_layer=2), fields)


def _refusal(kind: str, what: str) -> str:
    return f"lmc does not serve {what} (pool {kind}); supported: {SUPPORTED}"
