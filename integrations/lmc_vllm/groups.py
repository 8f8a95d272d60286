"""vLLM's KV cache groups as lmc keeps them: what a group needs of a prefix, and its chunks.

A group is layers that share a block table. Groups differ in what a sequence of n tokens still needs
of them: full attention everything, a sliding window the last tokens, chunked local attention the
tokens of the chunk that n lies in, a recurrent state the state at n alone. Every group has chunks,
keys and a store of its own; a prefix is a hit where each of them holds what it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from lmc.layout import MIN_CHUNK_TOKENS, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(Enum):
    FULL = "full attention"
    WINDOW = "a sliding window"
    LOCAL = "chunked local attention"
    STATE = "a recurrent state"


@dataclass(frozen=True, slots=True)
class Group:
    """Group number `id` of vLLM's KV cache. `reach` is the window or the local chunk in tokens."""

    id: int
    kind: Kind
    block_tokens: int
    chunk_tokens: int
    layer_names: tuple[str, ...]
    describes: str
    """What vLLM says of its blocks, for the namespace."""
    reach: int = 0
    offered: bool = False
    """States that vLLM hands over itself, at boundaries of its own."""

    def layout(self, page_bytes: Sequence[int]) -> KVLayout:
        return KVLayout(self.block_tokens, self.chunk_tokens, tuple(page_bytes))

    @property
    def step_tokens(self) -> int:
        return self.layout((1,)).step_tokens

    def first_needed(self, num_tokens: int) -> int:
        """The first token whose KV a prefix of `num_tokens` still needs."""
        match self.kind:
            case Kind.FULL:
                return 0
            case Kind.WINDOW:
                return max(0, num_tokens - self.reach + 1)
            case Kind.LOCAL:
                return num_tokens // self.reach * self.reach
            case Kind.STATE:
                return max(0, num_tokens - self.block_tokens)

    def first_block(self, num_tokens: int) -> int:
        """The block that holds `first_needed`: vLLM keeps whole blocks."""
        return self.first_needed(num_tokens) // self.block_tokens

    def serves_whole(self, num_tokens: int) -> bool:
        """Whether a prefix of exactly `num_tokens` serves a sequence of `num_tokens`: its last
        token is computed again, on what is needed for one token less.
        """
        return self.kind is not Kind.STATE and (
            self.first_block(num_tokens) == self.first_block(num_tokens - 1)
        )


def groups_of(kv_cache_config: Any, chunk_tokens: int) -> tuple[Group, ...]:
    """The groups of an engine; none for a model without a KV cache. Raises ValueError naming what
    lmc does not serve.
    """
    from vllm.v1 import kv_cache_interface as kv

    groups = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        if group.is_eagle_group:
            raise ValueError(_refusal("the KV of a draft model (EAGLE, MTP)", group))
        if not group.enable_kv_transfer or group.host_resident or group.role.value != "default":
            raise ValueError(_refusal(f"KV of the role {group.role.value}", group))
        specs = kv.iter_layer_specs(group.kv_cache_spec)
        if any(getattr(spec, "non_causal", False) for spec in specs):
            raise ValueError(_refusal("KV that hangs on later tokens too (non-causal)", group))
        groups.append(_group(number, group, chunk_tokens))
    sizes = {group.block_tokens for group in groups}
    if len(sizes) > 1 and any(group.offered for group in groups):
        # What vLLM hands over is then not always the state at the boundary it names.
        raise ValueError(
            f"lmc does not serve recurrent states in mamba_cache_mode 'align' beside blocks of "
            f"another size ({', '.join(map(str, sorted(sizes)))} tokens)"
        )
    return tuple(groups)


def unit_tokens(groups: Sequence[Group]) -> int:
    """Tokens at whose multiples a prefix can end: whole steps of every group."""
    return math.lcm(*(group.step_tokens for group in groups))


def _group(number: int, group: Any, chunk_tokens: int) -> Group:
    from vllm.v1 import kv_cache_interface as kv

    specs = list(kv.iter_layer_specs(group.kv_cache_spec))
    classes = {type(spec) for spec in specs}
    block = group.kv_cache_spec.block_size
    kind, reach, offered = Kind.FULL, 0, False
    if classes <= {kv.FullAttentionSpec, kv.MLAAttentionSpec}:
        chunk = max(1, chunk_tokens // block) * block
    elif classes == {kv.SlidingWindowSpec}:
        kind, reach = Kind.WINDOW, _one({spec.sliding_window for spec in specs}, "window", group)
        chunk = block
        while chunk * 2 <= min(reach, chunk_tokens):
            chunk *= 2
    elif classes == {kv.ChunkedLocalAttentionSpec}:
        kind = Kind.LOCAL
        reach = _one({spec.attention_chunk_size for spec in specs}, "attention chunk", group)
        chunk = math.gcd(reach, max(1, chunk_tokens // block) * block)
    elif classes == {kv.MambaSpec}:
        kind, chunk = Kind.STATE, block
        mode = _one({spec.mamba_cache_mode for spec in specs}, "mamba_cache_mode", group)
        if mode not in ("align", "all"):
            raise ValueError(
                _refusal(f"recurrent states in mamba_cache_mode {mode!r} (align serves)", group)
            )
        offered = mode == "align"
    else:
        unknown = ", ".join(sorted(found.__name__ for found in classes))
        raise ValueError(_refusal(unknown, group))
    # A chunk no longer than what is still there when it is complete: a block that slid out is gone.
    if kind in (Kind.WINDOW, Kind.LOCAL) and (chunk < MIN_CHUNK_TOKENS or reach < chunk != block):
        raise ValueError(_refusal(f"{kind.value} of {reach} tokens in blocks of {block}", group))
    names = tuple(group.layer_names)
    described = ";".join(sorted({repr(spec) for spec in specs}))
    made = Group(number, kind, block, chunk, names, described, reach, offered)
    made.layout((1,))  # raises where a chunk is not made of whole blocks
    return made


def _one(values: set[Any], what: str, group: Any) -> Any:
    if len(values) != 1:
        raise ValueError(_refusal(f"layers of one group that differ in {what}: {values}", group))
    return next(iter(values))


def _refusal(what: str, group: Any) -> str:
    return (
        f"lmc does not serve {what} (layer {group.layer_names[0]}); supported: full attention and "
        "MLA, sliding windows, chunked local attention, recurrent states at block boundaries"
    )
