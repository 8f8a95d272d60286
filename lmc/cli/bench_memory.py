"""What lmc does in memory: checksums, keys and lookup, and moving pages (which needs torch)."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from ..keys import Key, KeyChain, Namespace
from ..layout import KVLayout
from ..store import TieredStore
from ..tiers.arena import Arena
from ..tiers.ram import Chunk
from .row import Row, rounds, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK_TOKENS = 256
NUM_TOKENS = 128 << 10
NUM_CACHED = 100_000
POOL_CHUNKS = 16
NUM_CHUNKS = 7


@dataclass(frozen=True, slots=True)
class Model:
    """The KV of one token in one plane, and how many planes there are."""

    name: str
    plane_token_bytes: int
    num_planes: int


MODELS = (Model("SmolLM2-135M float32", 768, 60), Model("Llama-3-8B bf16", 2048, 64))


def checksum(num_rounds: int, num_bytes: int = 32 << 20) -> Iterator[Row]:
    """Of a chunk's payload, as it is written and read below RAM."""
    arena = Arena(2, num_bytes)
    arena.payload(0)[:] = os.urandom(num_bytes)
    ours, base = rounds(
        num_rounds,
        lambda: seconds(lambda: xxhash.xxh3_64_intdigest(arena.payload(0))),
        lambda: seconds(lambda: ctypes.memmove(arena.address(1), arena.address(0), num_bytes)),
    )
    name = f"xxh3-64 of {num_bytes >> 20} MiB"
    yield Row.rate("checksum", name, num_bytes, ours, "memcpy", base)


def keys(num_rounds: int, num_cached: int = NUM_CACHED) -> Iterator[Row]:
    """Naming a prompt of 128k tokens and finding all of it in RAM, against hashing alone."""
    for page in (64, 16):
        yield _keys(num_rounds, KVLayout(page, CHUNK_TOKENS, (1,)), num_cached)


def _keys(num_rounds: int, layout: KVLayout, num_cached: int) -> Row:
    tokens = array("q", range(NUM_TOKENS))
    raw, step = tokens.tobytes(), layout.step_tokens
    store = _filled(layout, tokens, num_cached)
    found = KeyChain(step_tokens=step).extend(tokens)
    if store.lookup(found) != len(found):
        raise AssertionError("the prompt that was stored is not found")
    naming, lookup, bare = rounds(
        num_rounds,
        lambda: seconds(lambda: KeyChain(step_tokens=step).extend(tokens)),
        lambda: seconds(lambda: store.lookup(found)),
        lambda: seconds(lambda: hashlib.sha256(raw)),
    )
    store.close()
    both = [a + b for a, b in zip(naming, lookup, strict=True)]
    share = f"{100 * sum(lookup) / sum(both):.0f} % of it lookup"
    name = f"name and find 128k tokens, pages of {layout.page_tokens} ({share})"
    return Row.time("keys", name, both, "SHA-256 alone", bare)


def _filled(layout: KVLayout, tokens: array[int], num_cached: int) -> TieredStore:
    """A store that holds `tokens` and unrelated chains of the same length. Slots stay empty: the
    memory of an arena is taken by first use.
    """
    slot_bytes = Arena.slot_size(layout.chunk_bytes)
    per_chain = len(tokens) // CHUNK_TOKENS
    num_chains = max(1, num_cached // per_chain)
    store = TieredStore(layout, Namespace.of({}), num_chains * per_chain * slot_bytes)
    num_keys = len(tokens) // layout.step_tokens
    for _ in range(num_chains - 1):
        noise = os.urandom(32 * num_keys)
        _store(store, [Key(noise[i : i + 32]) for i in range(0, len(noise), 32)])
    _store(store, KeyChain(step_tokens=layout.step_tokens).extend(tokens))
    return store


def _store(store: TieredStore, keys: list[Key]) -> None:
    steps = store.layout.chunk_steps
    chunks = [
        Chunk(tuple(keys[i : i + steps]), keys[i - 1] if i else None)
        for i in range(0, len(keys), steps)
    ]
    store.reserve(chunks).commit()


def transfer(
    num_rounds: int,
    models: tuple[Model, ...] = MODELS,
    pages: tuple[int, ...] = (64, 16, 1),
    pool_chunks: int = POOL_CHUNKS,
) -> Iterator[Row]:
    """Gather and scatter of a whole chunk against memcpy of as many bytes, one thread, in CPU
    seconds: a chunk that has left the processor's cache, as the oldest slot of an arena has.
    """
    for model in models:
        for page_tokens in pages:
            yield from _transfer(num_rounds, model, page_tokens, pool_chunks)


def _transfer(num_rounds: int, model: Model, page_tokens: int, pool_chunks: int) -> Iterator[Row]:
    import torch

    from ..transfer import PagedPool, Piece, gather, resolve, scatter

    num_pages = CHUNK_TOKENS // page_tokens
    size = CHUNK_TOKENS * model.plane_token_bytes * model.num_planes
    memory = Arena(1, pool_chunks * size)
    whole = torch.frombuffer(memory.payload(0), dtype=torch.uint8).fill_(7)
    shape = (model.num_planes, pool_chunks * num_pages, page_tokens * model.plane_token_bytes)
    pool = PagedPool(list(whole.view(shape)))
    chunks = Arena(NUM_CHUNKS, size)
    for slot in range(NUM_CHUNKS):
        ctypes.memset(chunks.address(slot), 7, size)
    addresses = itertools.cycle([chunks.address(slot) for slot in range(NUM_CHUNKS)])
    places = itertools.cycle(range(0, (pool_chunks - 1) * size + 1, size))
    backend = resolve("auto", pool.device)

    def move(op: Callable[..., None]) -> float:
        page_ids = torch.randperm(pool.num_pages)[:num_pages]
        pieces = [Piece(next(addresses), num_pages, 0, num_pages)]
        return seconds(lambda: op(pool, page_ids, pieces, backend=backend), time.thread_time)

    def memcpy() -> float:
        target, source = next(addresses), memory.address(0) + next(places)
        return seconds(lambda: ctypes.memmove(target, source, size), time.thread_time)

    bare, *taken = rounds(num_rounds, memcpy, lambda: move(gather), lambda: move(scatter))
    for op, ours in zip(("gather", "scatter"), taken, strict=True):
        name = f"{op} ({backend.name}), pages of {page_tokens}, {model.name}"
        yield Row.rate("transfer", name, size, ours, "memcpy", bare)
