"""Describes SGLang's device pools to lmc, or refuses them by name: a layout is never guessed from
shapes.

    nhd              [slots, heads, dim]                     a page is `page_size` slots
    hnd              [pages, heads, slots, dim]              SGLANG_USE_HND_KVCACHE
    vectorized_5d    [pages, heads, dim / x, slots, x] (K)   ROCm, SGLANG_AITER_KV_CACHE_LAYOUT

In each of them a page of a layer's K or V is one run of bytes, and slot s lies in page
s // page_size; what lies where inside a page is nobody's business here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmc.transfer import PagedPool

LAYOUTS = ("nhd", "hnd", "vectorized_5d")
DEVICES = ("cpu", "cuda")  # torch calls AMD's GPUs "cuda" too
SUPPORTED = (
    f"MHA/GQA pools (MHATokenToKVPool, layout {', '.join(LAYOUTS)}, no scales, no draft pool) "
    "on the CPU, NVIDIA's GPUs and AMD's"
)


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
    layout = mha.buffers.layout.value
    if layout not in LAYOUTS or pool.kv_cache_layout != layout:
        raise ValueError(_refusal(kind, f"layout {pool.kv_cache_layout}"))
    if mha.scales is not None or mha.transfer_buffers is not None:
        raise ValueError(_refusal(kind, "scales or relocatable buffers"))
    if mha.device.type not in DEVICES:
        raise ValueError(_refusal(kind, f"device {mha.device}"))
    fields = {
        "pool": kind,
        "pool_layout": layout,
        "kv_dtype": str(pool.dtype),
        "store_dtype": str(mha.dtype),
        "heads": str(mha.head_num),
        "head_dims": f"{mha.head_dim},{mha.v_head_dim}",
        "layers": ",".join(map(str, info.layer_ids)),
    }
    return DevicePool(_pages(pool, mha, params.page_size), fields)


def _pages(pool: Any, mha: Any, page_tokens: int) -> PagedPool:
    """A row of a buffer is a slot or a page, as the layout says; checked by the size of a page, as
    the model has it, and by the number that SGLang gives away.
    """
    planes = [plane for pair in zip(mha.buffers.k, mha.buffers.v, strict=True) for plane in pair]
    row_tokens = 1 if mha.buffers.layout.value == "nhd" else page_tokens
    pages = PagedPool.from_slots(planes, page_tokens // row_tokens, planes_per_layer=2)
    head_bytes = page_tokens * mha.head_num * mha.dtype.itemsize
    expected = (head_bytes * mha.head_dim, head_bytes * mha.v_head_dim)
    if any(pages.page_bytes[i : i + 2] != expected for i in range(0, len(planes), 2)):
        sizes = sorted(set(pages.page_bytes))
        raise ValueError(_refusal(type(pool).__name__, f"pages of {sizes} bytes for {expected}"))
    if pages.num_pages <= pool.size // page_tokens:  # the first page is nobody's
        what = f"{pages.num_pages} pages for {pool.size} tokens"
        raise ValueError(_refusal(type(pool).__name__, what))
    return pages


def _refusal(kind: str, what: str) -> str:
    return f"lmc does not serve {what} (pool {kind}); supported: {SUPPORTED}"
