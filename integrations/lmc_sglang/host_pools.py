"""Describes the host pools of SGLang's HiCache to lmc, or refuses them by name: nothing is guessed.

    layer_first                      [K, V][layer][token]    a page: one run a layer, K and V
    page_first, page_first_direct    [K, V][page][layer]...  a page: one run of K, one of V

MLA has one of these where others have K and V. Where the runs of a page lie is asked of the pool
itself, for its first, second and last page; runs that are not evenly spaced are refused.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from lmc.layout import MIN_CHUNK_TOKENS
from lmc.transfer import PagedPool

LAYOUTS = ("layer_first", "page_first", "page_first_direct")
POOLS = ("MHATokenToKVPoolHost", "AsymmetricMHATokenToKVPoolHost", "MLATokenToKVPoolHost")


@dataclass(frozen=True, slots=True)
class HostPool:
    """A pool as lmc moves it, and what of it belongs into the namespace."""

    pages: PagedPool
    page_tokens: int
    fields: dict[str, str]


def describe(pool: Any, server_args: Any) -> HostPool:
    """Raises ValueError naming the pool and what is supported."""
    kind = type(pool).__name__
    if kind not in POOLS or type(pool).__module__.partition(".")[0] != "sglang":
        raise ValueError(refusal(kind, "this pool"))
    if pool.layout not in LAYOUTS:
        raise ValueError(refusal(kind, f"--hicache-mem-layout {pool.layout}"))
    if pool.page_size < MIN_CHUNK_TOKENS:
        raise ValueError(
            f"lmc keeps HiCache's pages one by one, and pages of {pool.page_size} tokens cost more "
            f"to name and to read than to compute: --page-size must be at least {MIN_CHUNK_TOKENS}"
        )
    if pool.layer_num != pool.target_layer_num:
        raise ValueError(refusal(kind, "draft layers in the pages of the model"))
    if pool.dcp_size > 1 or pool.kv_buffer is None:
        raise ValueError(refusal(kind, "pages that are divided or left to another rank"))
    if kind != "MLATokenToKVPoolHost":
        layouts = {info.buffers.layout.value for info in pool._buffer_infos}
        if layouts != {"nhd"}:
            raise ValueError(refusal(kind, f"layout {', '.join(sorted(layouts))} on the device"))
    from sglang.srt.mem_cache.kv_cache_dtype import fp8_dtype

    fields = {
        "door": "hicache",
        "pool": kind,
        "pool_layout": pool.layout,
        "format_tag": str(pool.storage_format_tag),
        "store_dtype": str(pool.dtype),
        "kv_cache_dtype": str(server_args.kv_cache_dtype),
        "fp8": str(fp8_dtype),  # machines differ in what they call by one name
        "layers": f"{pool.start_layer}-{pool.end_layer}",
        "shape": "x".join(map(str, _shape(pool))),
    }
    return HostPool(_pages(pool), pool.page_size, fields)


def refusal(kind: str, what: str) -> str:
    return (
        f"lmc does not serve {what} under HiCache (pool {kind}); supported: {', '.join(POOLS)} "
        f"in the layouts {', '.join(LAYOUTS)}, without pools beside them"
    )


def _shape(pool: Any) -> tuple[int, ...]:
    """Layers, heads and the width of a token's K and V."""
    if type(pool).__name__ == "MLATokenToKVPoolHost":
        return pool.layer_num, pool.kv_lora_rank, pool.qk_rope_head_dim, pool.kv_cache_dim
    return pool.layer_num, pool.head_num, pool.head_dim, pool.v_head_dim


def _pages(pool: Any) -> PagedPool:
    last = pool.page_num - 1
    bases, sizes = _runs(pool, 0)
    strides = [at - base for base, at in zip(bases, _runs(pool, min(1, last))[0], strict=True)]
    ends = [base + last * stride for base, stride in zip(bases, strides, strict=True)]
    expected = pool.page_size * pool.size_per_token
    if _runs(pool, last) != (ends, sizes) or sum(sizes) != expected:
        what = f"{len(sizes)} runs, {sum(sizes)} bytes a page for {expected}, in this order"
        raise ValueError(refusal(type(pool).__name__, what))
    places = zip(bases, strides, sizes, strict=True)
    return PagedPool([_plane(*place, pool.page_num) for place in places])


def _runs(pool: Any, page: int) -> tuple[list[int], list[int]]:
    """Addresses and sizes of the runs that make up a page."""
    first = page * pool.page_size
    addresses, sizes = pool.get_page_buffer_meta(torch.arange(first, first + pool.page_size))
    return list(addresses), list(sizes)


def _plane(base: int, stride: int, size: int, num_pages: int) -> torch.Tensor:
    """The memory of one run of every page. It is the pool's, which outlives its use here."""
    memory = (ctypes.c_uint8 * ((num_pages - 1) * stride + size)).from_address(base)
    return torch.frombuffer(memory, dtype=torch.uint8).as_strided((num_pages, size), (stride, 1))
