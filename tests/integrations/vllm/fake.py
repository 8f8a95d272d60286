"""A model without weights: what its layers are called and shaped like, what bytes belong into their
KV caches, and what it says.

Everything is a function of the tokens so far: `chain[i]` stands for tokens 0..i, and the KV of
token i is made of it, of the layer, of the worker's share and of the head.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1 import kv_cache_interface as kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.kv_cache_interface import KVCacheSpec

MASK = (1 << 64) - 1
SEED = 0x9E3779B97F4A7C15

# --- tokens


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(length)]


def seed_of(*what: object) -> int:
    """Where a chain begins: what changes KV apart from tokens."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little")


def extend(chain: list[int], tokens: Sequence[int], seed: int) -> None:
    """Bring a chain, one number a token that stands for all tokens up to it, to all of `tokens`.
    `seed` counts for each: it may change under way.
    """
    at = chain[-1] if chain else 0
    for token in tokens[len(chain) :]:
        at = (at * 6364136223846793005 + token + seed) & MASK
        chain.append(at)


def next_token(chain: int) -> int:
    return 3 + (chain >> 33) % 997


def answer(tokens: Sequence[int], count: int, seed: int) -> list[int]:
    """What the model says to `tokens`."""
    said, chain = list(tokens), []
    for _ in range(count):
        extend(chain, said, seed)
        said.append(next_token(chain[-1]))
    return said[len(tokens) :]


# --- models: layers by name, as every worker of a stage has them


def attention(heads: int = 2, block: int = 16, head: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "block_size": block,
        "num_kv_heads": heads,
        "head_size": head,
        "dtype": torch.bfloat16,
        **more,
    }


def full(count: int, **shape: Any) -> dict[str, KVCacheSpec]:
    return {f"layers.{i}.attn": kv.FullAttentionSpec(**attention(**shape)) for i in range(count)}


def mla(count: int, **shape: Any) -> dict[str, KVCacheSpec]:
    fields = attention(**{"heads": 1, "head": 72, "max_tp_shards": 1, **shape})
    return {f"layers.{i}.attn": kv.MLAAttentionSpec(**fields) for i in range(count)}


def sliding(count: int, window: int, every: int = 2, **shape: Any) -> dict[str, KVCacheSpec]:
    """Layers with a sliding window; each `every`-th has full attention."""
    fields = attention(**shape)
    return {
        f"layers.{i}.attn": kv.SlidingWindowSpec(**fields, sliding_window=window)
        if (i + 1) % every
        else kv.FullAttentionSpec(**fields)
        for i in range(count)
    }


def local(count: int, chunk: int, **shape: Any) -> dict[str, KVCacheSpec]:
    """Layers with chunked local attention; each second has full attention."""
    fields = attention(**shape)
    return {
        f"layers.{i}.attn": kv.FullAttentionSpec(**fields)
        if i % 2
        else kv.ChunkedLocalAttentionSpec(**fields, attention_chunk_size=chunk)
        for i in range(count)
    }


def mamba(count: int, mode: str, block: int = 64, **shape: Any) -> dict[str, KVCacheSpec]:
    """Layers with a recurrent state; each second has full attention."""
    fields = attention(block=block, **shape)
    attend = kv.FullAttentionSpec(**fields)
    state = kv.MambaSpec(
        block_size=block,
        shapes=((attend.page_size_bytes // 4,),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
    )
    return {f"layers.{i}.mixer": attend if i % 2 else state for i in range(count)}


# --- caches


@dataclass
class Context:
    """A request as a worker knows it."""

    tokens: list[int]
    blocks: list[list[int]]
    seed: int
    media: tuple[tuple[int, int, int], ...] = ()  # (offset, length, number of its content)
    chain: list[int] = field(default_factory=list)

    def numbers(self, end: int) -> np.ndarray:
        """What stands for each prefix of up to `end` tokens."""
        tokens = self.tokens[:end]
        for offset, length, number in self.media:
            for at in range(offset, min(offset + length, end)):
                tokens[at] += number
        extend(self.chain, tokens, self.seed)
        return np.array(self.chain[:end], dtype=np.uint64)


class Layer:
    """One layer's cache on one worker, as 64-bit words, and the words that belong there."""

    def __init__(
        self, name: str, spec: Any, group: int, cache: torch.Tensor, blocks: int, who: int
    ):
        self.name, self.spec, self.group = name, spec, group
        self.words = cache.view(torch.int8).numpy().view(np.uint64)  # [blocks, H, N, words]
        self.ratio = cache.shape[0] // blocks
        _, heads, self.kernel_block, words = self.words.shape
        rng = np.random.default_rng(seed_of(name, who))
        self.key = rng.integers(0, 1 << 63, (heads, words), dtype=np.uint64)

    def expected(self, numbers: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return (numbers[:, None, None] ^ self.key) * np.uint64(SEED | 1)

    @property
    def is_state(self) -> bool:
        return isinstance(self.spec, kv.MambaSpec)

    def first_read(self, start: int) -> int:
        """The first token that the token at `start` attends to."""
        if isinstance(self.spec, kv.SlidingWindowSpec):
            return max(0, start - self.spec.sliding_window + 1)
        if isinstance(self.spec, kv.ChunkedLocalAttentionSpec):
            return start // self.spec.attention_chunk_size * self.spec.attention_chunk_size
        return 0

    def _places(self, context: Context, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(begin, end)
        block = self.spec.block_size
        table = np.array(context.blocks[self.group], dtype=np.int64)
        inside = at % block
        row = table[at // block] * self.ratio + inside // self.kernel_block
        return row, inside % self.kernel_block

    def write(self, context: Context, start: int, end: int) -> None:
        row, slot = self._places(context, start, end)
        self.words[row, :, slot] = self.expected(context.numbers(end)[start:])

    def check(self, context: Context, start: int, end: int, who: str) -> None:
        begin = self.first_read(start)
        row, slot = self._places(context, begin, end)
        right = self.words[row, :, slot] == self.expected(context.numbers(end)[begin:])
        assert right.all(), (
            f"{who}: wrong KV in {self.name}, tokens "
            f"{begin + np.flatnonzero(~right.all(axis=(1, 2)))[:20]} "
            f"when tokens {start}..{end} are computed"
        )

    def check_state(self, context: Context, start: int, who: str) -> None:
        if start:
            block = context.blocks[self.group][(start - 1) // self.spec.block_size]
            right = self.words[block, :, 0] == self.expected(context.numbers(start)[-1:])[0]
            assert right.all(), f"{who}: wrong state in {self.name} at {start} tokens"

    def write_state(self, context: Context, start: int, end: int) -> None:
        block = self.spec.block_size
        ends = [end]
        if self.spec.mamba_cache_mode == "all":
            ends = [*range((start // block + 1) * block, end, block), end]
        for stop in ends:
            at = context.blocks[self.group][(stop - 1) // block]
            self.words[at, :, 0] = self.expected(context.numbers(stop)[-1:])[0]
