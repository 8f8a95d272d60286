"""After a restart what was used last comes up by itself, into free memory, and is what it was."""

from __future__ import annotations

import array
import hashlib

import pytest

from lmc.keys import KeyChain, Namespace
from lmc.layout import KVLayout
from lmc.store import TieredStore
from lmc.tiers.arena import Arena
from lmc.tiers.disk import DiskTier
from lmc.tiers.ram import Chunk

LAYOUT = KVLayout(64, 256, (4096,) * 2)
SLOT = Arena.slot_size(LAYOUT.chunk_bytes)
MODEL = Namespace.of({"weights": "one"})


def keys_of(seed: int, steps: int):
    return KeyChain(b"%d" % seed, 64).extend(array.array("q", range(64 * steps)))


def payload(chunk: Chunk) -> bytes:
    size = LAYOUT.payload_bytes(len(chunk.keys))
    return (hashlib.sha256(chunk.key).digest() * (size // 32 + 1))[:size]


@pytest.fixture
def opened(tmp_path):
    stores = []

    def build(slots: int = 40, namespace: Namespace = MODEL) -> TieredStore:
        tier = DiskTier(tmp_path, 10**9)
        stores.append(TieredStore(LAYOUT, namespace, slots * SLOT, [tier]))
        return stores[-1]

    yield build
    for store in stores:
        store.close(1)


def fill(store: TieredStore, seed: int, steps: int) -> None:
    keys = keys_of(seed, steps)
    chunks = [Chunk(tuple(keys[i : i + 4]), keys[i - 1] if i else None) for i in range(0, steps, 4)]
    lease = store.reserve(chunks)
    for chunk, slot in zip(lease.chunks, lease.slots, strict=True):
        store.arena.payload(slot)[: LAYOUT.payload_bytes(len(chunk.keys))] = payload(chunk)
    lease.commit()
    assert store.drain(10)


def warmed(store: TieredStore) -> TieredStore:
    store.warm()
    assert store.warming
    assert store.drain(10)
    assert not store.warming
    store.ram.check()
    return store


def check(store: TieredStore, seed: int, steps: int) -> None:
    keys = keys_of(seed, steps)
    with store.acquire(keys) as lease:
        assert lease.steps == steps
        for n, span in enumerate(lease.spans):
            chunk = Chunk(tuple(keys[4 * n : 4 * n + span.total]), None)
            held = store.arena.payload(span.slot)[: LAYOUT.payload_bytes(span.total)]
            assert held == payload(chunk)


def test_what_was_stored_is_there_without_being_asked_for(opened) -> None:
    first = opened()
    fill(first, 1, 10)
    first.close(5)
    second = warmed(opened())
    check(second, 1, 10)
    assert second.snapshot()["disk.warmed"] == 3
    assert second.snapshot()["spill_queue_bytes"] == 0


def test_a_chain_keeps_its_order_of_leaving(opened) -> None:
    first = opened(slots=12)
    fill(first, 1, 16)
    first.close(5)
    second = warmed(opened(slots=12))
    fill(second, 2, 40)  # ten chunks: two of the four have to go
    assert second.lookup(keys_of(1, 16)) == 8, "from the end"


def test_a_chain_is_one_again(opened) -> None:
    """Whoever uses its end keeps its beginning."""
    first = opened()
    fill(first, 1, 16)
    first.close(5)
    second = warmed(opened())
    keys = keys_of(1, 16)
    slots = [span.slot for span in second.ram.find(keys)]
    assert [second.ram.parent_key(slot) for slot in slots] == [None, keys[3], keys[7], keys[11]]
    second.ram.touch(second.ram.find(keys[12:], 12))
    fill(second, 2, 4 * (second.ram.num_free + 2))
    assert second.lookup(keys) == 8


def test_no_more_than_half_of_free_memory_and_the_hottest_of_all(opened) -> None:
    first = opened(slots=40)
    for seed in range(1, 6):
        fill(first, seed, 16)
    first.close(5)
    second = warmed(opened(slots=12))
    assert second.ram.num_free >= 6
    check(second, 5, 16)


def test_chunks_of_another_model_stay_where_they_are(opened, tmp_path) -> None:
    first = opened()
    fill(first, 1, 8)
    first.close(5)
    files = sorted(tmp_path.glob("chunks/*/*"))
    other = warmed(opened(namespace=Namespace.of({"weights": "other"})))
    assert other.ram.num_free == other.arena.num_slots
    assert sorted(tmp_path.glob("chunks/*/*")) == files


def test_a_damaged_chunk_is_left_out(opened, tmp_path) -> None:
    first = opened()
    fill(first, 1, 12)
    first.close(5)
    for file in tmp_path.glob("chunks/*/*"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    store = warmed(opened())
    assert store.lookup(keys_of(1, 12)) == 0
    assert store.ram.num_free == store.arena.num_slots


def test_weights_that_change_meanwhile(opened) -> None:
    first = opened()
    fill(first, 1, 12)
    first.close(5)
    store = opened()
    store.warm()
    store.renew()
    assert store.drain(10)
    store.ram.check()
    assert store.lookup(keys_of(1, 12)) == 0
    assert store.ram.num_free == store.arena.num_slots


def test_a_request_beside_it_gets_its_chunks(opened) -> None:
    first = opened()
    fill(first, 1, 12)
    first.close(5)
    store = opened()
    store.warm()
    ticket = store.stage(keys_of(1, 12))
    assert store.settle(ticket, 5)
    check(store, 1, 12)
    ticket.close()
    assert store.drain(10)
    store.ram.check()


def test_it_goes_before_what_was_used_and_the_hottest_last(opened) -> None:
    first = opened(slots=12)
    for seed in range(1, 5):
        fill(first, seed, 4)
    first.close(5)
    second = opened(slots=12)
    fill(second, 9, 4)  # a request before anything came up
    warmed(second)
    fill(second, 10, 4 * 9)
    left = [seed for seed in (1, 2, 3, 4, 9) if second.lookup(keys_of(seed, 4))]
    assert left == [3, 4, 9]
