"""What core tests store: documents whose keys come from tokens, and payloads that are a function
of their keys, so that every reader can tell right from wrong.
"""

from __future__ import annotations

import errno
import hashlib
import time
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from lmc.keys import Key, KeyChain, Namespace
from lmc.layout import KVLayout
from lmc.store import TieredStore
from lmc.tiers.ram import Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmc.tiers.ram import ReadLease, WriteLease
    from lmc.tiers.tier import Tier

LAYOUT = KVLayout(page_tokens=16, chunk_tokens=64, plane_bytes=(96, 32, 96))
"""Chunks of four steps, of three planes; a whole chunk is 896 bytes."""
STEPS = LAYOUT.chunk_steps
NAMESPACE = Namespace.of({"model": "test"})
EIO = OSError(errno.EIO, "injected")


def slots(num_chunks: int) -> int:
    """Bytes of RAM that hold so many chunks."""
    return num_chunks * 8192


def keys_of(doc: object, num_steps: int, *, after: Sequence[Key] = ()) -> list[Key]:
    """Keys of a document's first steps; `after` the keys of another, it diverges there."""
    root = after[-1] if after else b"root"
    chain = KeyChain(root + repr(doc).encode(), 1)
    return [*after, *chain.extend(array("q", range(num_steps - len(after))))]


def chunks_of(keys: Sequence[Key]) -> list[Chunk]:
    """A whole sequence cut into chunks and a tail."""
    return [
        Chunk(tuple(keys[i : i + STEPS]), keys[i - 1] if i else None)
        for i in range(0, len(keys), STEPS)
    ]


@lru_cache(10_000)
def page_of(key: Key, plane: int, weights: int = 0) -> bytes:
    """What the step `key` holds in a plane, as these weights compute it."""
    size = LAYOUT.plane_bytes[plane]
    return (hashlib.sha256(bytes([plane, weights]) + key).digest() * 3)[:size]


def payload_of(keys: Sequence[Key], weights: int = 0) -> bytes:
    """What a chunk of these steps holds: [plane][step][bytes]."""
    planes = range(len(LAYOUT.plane_bytes))
    return b"".join(page_of(key, plane, weights) for plane in planes for key in keys)


def fill(store: TieredStore, lease: WriteLease, weights: int = 0) -> None:
    """Write what the chunks of a lease should hold."""
    for chunk, slot in zip(lease.chunks, lease.slots, strict=True):
        payload = payload_of(chunk.keys, weights)
        store.arena.payload(slot)[: len(payload)] = payload


def put(store: TieredStore, keys: Sequence[Key], weights: int = 0) -> int:
    """Store a sequence; how many chunks were taken."""
    lease = store.reserve(chunks_of(keys))
    fill(store, lease, weights)
    lease.commit()
    return len(lease)


def check_bytes(
    store: TieredStore, lease: ReadLease, keys: Sequence[Key], start: int = 0, weights: int = 0
) -> None:
    """Every step of a lease holds what its key says."""
    at = 0
    for span in lease.spans:
        payload = bytes(store.arena.payload(span.slot))
        assert span.first == (start + at) % STEPS
        for n in range(span.steps):
            for plane, size in enumerate(LAYOUT.plane_bytes):
                begin = LAYOUT.plane_offset(plane, span.total) + (span.first + n) * size
                page = page_of(keys[at + n], plane, weights)
                assert payload[begin : begin + size] == page, "wrong bytes"
        at += span.steps


def get(store: TieredStore, keys: Sequence[Key], start: int = 0) -> int:
    """How many leading steps RAM has, after comparing every byte of them."""
    with store.acquire(keys, start) as lease:
        assert lease.steps == store.lookup(keys, start)
        check_bytes(store, lease, keys, start)
        return lease.steps


def bring(store: TieredStore, keys: Sequence[Key], timeout_s: float = 10.0) -> int:
    """Stage, wait, read and let go: a request's whole way. How many steps came."""
    ticket = store.stage(keys)
    assert store.settle(ticket, timeout_s)
    steps = get(store, keys)
    ticket.close()
    return steps


def push_out(store: TieredStore) -> None:
    """Leave nothing idle in RAM."""
    filler = [Chunk((key,), None) for key in keys_of(time.monotonic_ns(), store.arena.num_slots)]
    store.reserve(filler).abort()


def open_store(
    *tiers: Tier, num_chunks: int = 16, io_threads: int = 2, queue_bytes: int = 10**9
) -> TieredStore:
    return TieredStore(
        LAYOUT,
        NAMESPACE,
        slots(num_chunks),
        tiers,
        io_threads=io_threads,
        write_queue_bytes=queue_bytes,
    )


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


def poll_until(store: TieredStore, condition: Callable[[], object]) -> None:
    def polled() -> object:
        store.poll()
        return condition()

    wait_until(polled)
