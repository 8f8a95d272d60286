"""Describes SGLang's device pools to lmc, or refuses them by name: a layout is never guessed from
shapes.

    nhd              [slots, heads, dim]                     a page is `page_size` slots
    hnd              [pages, heads, slots, dim]              SGLANG_USE_HND_KVCACHE
    vectorized_5d    [pages, heads, dim / x, slots, x] (K)   ROCm, SGLANG_AITER_KV_CACHE_LAYOUT
    MLA              [slots, 1, latent]                      the same on every rank of a TP group
    scales           [slots, ...] or [pages, ...]            of quantized KV, beside it
    indexer (DSA)    [pages, bytes]
    states           [layers, slots, ...]                    Mamba, linear attention; one a prefix

In each of them what a page holds is one run of bytes a plane, and slot s lies in page
s // page_size; what lies where inside a page is nobody's business here. What SGLang addresses by
the same slots is one pool: the model's layers, and those of a draft model behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from lmc.transfer import PagedPool
from lmc.transfer.pages import page_view

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUTS = ("nhd", "hnd", "vectorized_5d")
DEVICES = ("cpu", "cuda")  # torch calls AMD's GPUs "cuda" too
SUPPORTED = (
    f"MHA and GQA (layout {', '.join(LAYOUTS)}), MLA and DSA, with scales or without, a sliding "
    "window beside full attention, Mamba states, draft models on the same slots; on the CPU, "
    "NVIDIA's GPUs and AMD's"
)


class Kind(Enum):
    """What of a pool a prefix needs."""

    FULL = "full attention"
    """All of it."""
    WINDOW = "a sliding window"
    """Its last pages."""
    STATE = "a recurrent state"
    """What the model made of it: one slot."""


@dataclass(frozen=True, slots=True)
class DevicePool:
    """A pool as lmc moves it, and what of it belongs into the namespace."""

    name: str
    """Of SGLang's transfers."""
    kind: Kind
    pages: PagedPool
    fields: dict[str, str]
    replicated: bool = False
    """Whether all ranks of a TP group hold the same bytes."""
    window_pages: int = 0

    @property
    def num_layers(self) -> int:
        return self.pages.num_layers


@dataclass(frozen=True, slots=True)
class _Plane:
    """`layer` of the engine reads it; a row holds `row_tokens` of a page's tokens."""

    layer: int
    rows: torch.Tensor
    row_tokens: int


def describe(params: Any, components: Any) -> tuple[DevicePool, ...]:
    """The pools behind `params`, full attention first. Raises ValueError naming the pool and what
    is supported.
    """
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    kv = params.token_to_kv_pool_allocator.get_kvcache()
    page = params.page_size
    expected = {ComponentType.FULL}
    full, layers, window = kv, None, None
    if type(kv) is SWAKVPool:
        expected |= {ComponentType.SWA}
        full, window = kv.full_kv_pool, kv.swa_kv_pool
        layers = _layers_of(kv, window=False)
    elif type(kv) is HybridLinearKVPool:
        expected |= {ComponentType.MAMBA}
        full = kv.full_kv_pool
        layers = [layer - kv.start_layer for layer in kv.full_attention_layer_id_mapping]
    if ComponentType.MAMBA in set(components):  # beside a window as well
        expected |= {ComponentType.MAMBA}
    if set(components) != expected:
        names = ", ".join(sorted(str(getattr(c, "name", c)) for c in components))
        raise ValueError(_refusal(kv, f"a tree of {names}"))
    if (found := params.token_to_kv_pool_allocator.page_size) != page:
        raise ValueError(_refusal(kv, f"pages of {found} tokens in a tree of {page}"))
    drafts = (*params.sidecar_draft_device_pools, *params.mtp_draft_device_pools)
    pools = [_full(full, layers, drafts, params)]
    if window is not None:
        pools.append(_window(kv, drafts, page, params.swa_retain_window))
    if ComponentType.MAMBA in expected:
        pools.append(_states(kv, params))
    return tuple(pools)


def _full(pool: Any, layers: Sequence[int] | None, drafts: Any, params: Any) -> DevicePool:
    planes, fields, replicated = _planes(pool, layers, params.page_size)
    last = max((plane.layer for plane in planes), default=0)
    for number, draft in enumerate(drafts):
        part = getattr(draft, "full_kv_pool", draft)
        more, described, same = _planes(part, None, params.page_size)
        planes += [_Plane(last, plane.rows, plane.row_tokens) for plane in more]
        fields |= {f"draft{number}.{name}": value for name, value in described.items()}
        replicated = replicated and same
    if params.is_eagle:
        fields["keys"] = "bigrams"
    pages = _paged(pool, planes, params.page_size)
    if pages.num_pages <= pool.size // params.page_size:  # the first page is nobody's
        raise ValueError(_refusal(pool, f"{pages.num_pages} pages for {pool.size} tokens"))
    return DevicePool("kv", Kind.FULL, pages, fields, replicated)


def _window(kv: Any, drafts: Any, page: int, window: int | None) -> DevicePool:
    if not window or kv.swa_req_ring_size is not None:
        raise ValueError(_refusal(kv, "windows that requests keep for themselves"))
    planes, fields, replicated = _planes(kv.swa_kv_pool, _layers_of(kv, window=True), page)
    last = max((plane.layer for plane in planes), default=0)
    for number, draft in enumerate(drafts):
        if (part := getattr(draft, "swa_kv_pool", None)) is not None:
            more, described, same = _planes(part, None, page)
            planes += [_Plane(last, plane.rows, plane.row_tokens) for plane in more]
            fields |= {f"draft{number}.{name}": value for name, value in described.items()}
            replicated = replicated and same
    fields["window"] = str(window)
    pages = _paged(kv, planes, page)
    return DevicePool("swa", Kind.WINDOW, pages, fields, replicated, -(-window // page))


def _states(kv: Any, params: Any) -> DevicePool:
    table = params.req_to_token_pool
    if getattr(table, "mamba_ckpt_pool", None) is not None:
        raise ValueError(_refusal(kv, "states kept as int8 checkpoints"))
    if params.mtp_draft_mamba_pools:
        raise ValueError(_refusal(kv, "states of a draft model"))
    (info,) = table.mamba_pool.get_device_pool_infos()
    buffers = info.buffer_info
    if buffers.extra_checkpoint_buffers:
        raise ValueError(_refusal(kv, "side states (short convolution, n-grams)"))
    states = [state for state in (buffers.temporal, *buffers.conv) if state.numel()]
    planes = [
        _Plane(layer - kv.start_layer, state[at], 1)
        for at, layer in enumerate(info.layer_ids)
        for state in states
    ]
    fields = {
        "pool": type(table.mamba_pool).__name__,
        "state_shapes": ";".join(f"{state.dtype}{tuple(state.shape[2:])}" for state in states),
        "layers": ",".join(map(str, info.layer_ids)),
    }
    return DevicePool("mamba", Kind.STATE, _paged(kv, planes, 1), fields)


def _layers_of(kv: Any, *, window: bool) -> list[int]:
    """The engine's layers that read one of the two pools, in the order of its buffers."""
    found = {at: layer for layer, (at, is_swa) in kv.layers_mapping.items() if is_swa is window}
    return [found[at] - kv.start_layer for at in sorted(found)]


def _planes(
    pool: Any, layers: Sequence[int] | None, page: int
) -> tuple[list[_Plane], dict[str, str], bool]:
    """Planes in the order of layers, what they are, and whether all ranks hold the same."""
    from sglang.srt.mem_cache import memory_pool as known

    if type(pool) in (
        known.MHATokenToKVPool,
        known.MHATokenToKVPoolFP4,
        known.MHATokenToKVPoolMXFP8,
    ):
        buffers, fields, replicated = *_mha(pool, page), False
    elif type(pool) in (
        known.MLATokenToKVPool,
        known.MLATokenToKVPoolFP4,
        known.DSATokenToKVPool,
    ):
        buffers, fields, replicated = *_mla(pool, page), True
    else:
        raise ValueError(_refusal(pool, "this pool"))
    if layers is None:
        layers = range(len(buffers))
    if len(layers) != len(buffers):
        raise ValueError(_refusal(pool, f"{len(buffers)} buffers for {len(layers)} layers"))
    planes = [
        _Plane(layer, rows, row_tokens)
        for layer, of_layer in zip(layers, buffers, strict=True)
        for rows, row_tokens in of_layer
    ]
    return planes, fields | {"pool": type(pool).__name__}, replicated


_Buffers = list[list[tuple[torch.Tensor, int]]]
"""By layer: buffers, and the tokens of a row."""


def _mha(pool: Any, page: int) -> tuple[_Buffers, dict[str, str]]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPoolFP4

    (info,) = pool.get_device_pool_infos()
    mha = info.buffer_info
    layout = mha.buffers.layout.value
    if layout not in LAYOUTS or pool.kv_cache_layout != layout:
        raise ValueError(_refusal(pool, f"layout {pool.kv_cache_layout}"))
    if mha.transfer_buffers is not None:
        raise ValueError(_refusal(pool, "relocatable buffers"))
    if mha.device.type not in DEVICES:
        raise ValueError(_refusal(pool, f"device {mha.device}"))
    row = 1 if layout == "nhd" else page
    width = mha.head_num * mha.dtype.itemsize * row
    packed = 2 if type(pool) is MHATokenToKVPoolFP4 else 1  # numbers in a byte
    sizes = width * mha.head_dim // packed, width * mha.v_head_dim // packed
    buffers: _Buffers = []
    for k, v in zip(mha.buffers.k, mha.buffers.v, strict=True):
        found = k[0].numel() * k.element_size(), v[0].numel() * v.element_size()
        if found != sizes:
            raise ValueError(_refusal(pool, f"rows of {found} bytes for {sizes}"))
        buffers.append([(k, row), (v, row)])
    fields = {
        "pool_layout": layout,
        "kv_dtype": str(pool.dtype),
        "store_dtype": str(mha.dtype),
        "heads": str(mha.head_num),
        "head_dims": f"{mha.head_dim},{mha.v_head_dim}",
        "layers": ",".join(map(str, info.layer_ids)),
    }
    if mha.scales is not None:
        fields["scales"] = mha.scales.layout.value
        row = 1 if mha.scales.layout.value == "token" else page
        for of_layer, k, v in zip(buffers, mha.scales.k, mha.scales.v, strict=True):
            of_layer += [(k, row), (v, row)]
    return buffers, fields


def _mla(pool: Any, page: int) -> tuple[_Buffers, dict[str, str]]:
    (info,) = pool.get_device_pool_infos()
    mla = info.buffer_info
    if not isinstance(mla.buffers, tuple) or mla.native_buffers is not None:
        raise ValueError(_refusal(pool, "buffers split by an NPU"))
    if len(mla.layer_indices) != mla.device_layer_num or pool.dcp_replicated:
        raise ValueError(_refusal(pool, "layers shared out among ranks"))
    buffers: _Buffers = [[(rows, 1)] for rows in mla.buffers]
    fields = {
        "pool_layout": "latent",
        "kv_dtype": str(pool.dtype),
        "store_dtype": str(mla.dtype),
        "latent": f"{mla.kv_lora_rank}+{mla.qk_rope_head_dim},{mla.kv_cache_dim}",
        "packed_fp8": str(mla.packed_fp8),
        "layers": ",".join(map(str, info.layer_ids)),
    }
    if mla.scales is not None:
        fields["scales"] = "token"
        for of_layer, rows in zip(buffers, mla.scales, strict=True):
            of_layer.append((rows, 1))
    if hasattr(pool, "index_k_with_scale_buffer"):
        if pool.index_kpool != 1 or pool.index_page_size != page:
            raise ValueError(_refusal(pool, "an indexer with pages of its own"))
        index = pool.index_k_with_scale_buffer
        fields["indexer"] = f"{pool.index_head_dim},{[int(not rows.numel()) for rows in index]}"
        for of_layer, rows in zip(buffers, index, strict=True):
            if rows.numel():  # one page more than there are, if a page is one token
                of_layer.append((rows[: (pool.size + page) // page], page))
    return buffers, fields


def _paged(pool: Any, planes: list[_Plane], page: int) -> PagedPool:
    """Rows as pages. A pool on a device that lmc does not know is refused."""
    if not planes:
        raise ValueError(_refusal(pool, "a pool without layers"))
    for plane in planes:
        if plane.rows.device.type not in DEVICES:
            raise ValueError(_refusal(pool, f"device {plane.rows.device}"))
    planes = sorted(planes, key=lambda plane: plane.layer)
    try:
        views = [page_view(plane.rows, page // plane.row_tokens) for plane in planes]
        return PagedPool(views, [plane.layer for plane in planes])
    except ValueError as error:
        raise ValueError(_refusal(pool, str(error))) from error


def _refusal(pool: Any, what: str) -> str:
    return f"lmc does not serve {what} (pool {type(pool).__name__}); supported: {SUPPORTED}"
