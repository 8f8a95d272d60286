"""The store: what is promised is in RAM, what fails below is a counted miss, and who waits for
whom.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import lmc.store as module
from lmc.keys import Namespace
from lmc.layout import KVLayout
from lmc.store import TICKET_LIFE_S, TieredStore
from lmc.testing import Fault, FaultyTier, MemoryTier
from lmc.tiers import guard
from lmc.tiers.disk import DiskTier
from lmc.tiers.guard import MAX_ERRORS
from tests.core.chunks import (
    EIO,
    LAYOUT,
    NAMESPACE,
    STEPS,
    bring,
    check_bytes,
    chunks_of,
    fill,
    get,
    keys_of,
    open_store,
    poll_until,
    push_out,
    put,
    slots,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lmc.keys import Key


A, B, C = (keys_of(doc, 32) for doc in "abc")


class Below(MemoryTier):
    """A tier that may call itself anything."""

    def __init__(self, name: str = "memory", *, persistent: bool = False) -> None:
        super().__init__()
        self.name, self.persistent = name, persistent


@pytest.fixture
def below() -> FaultyTier:
    return FaultyTier(MemoryTier())


@pytest.fixture
def store(below: FaultyTier) -> Iterator[TieredStore]:
    store = open_store(below, num_chunks=32)
    yield store
    store.ram.check()
    store.close()
    store.ram.check()
    assert store.ram.num_free + store.ram.num_idle == store.arena.num_slots, "a lease was lost"
    assert not store._fetching
    assert store._num_fetching == 0


def put_below(store: TieredStore, *docs: list[Key]) -> None:
    """Documents that are below only; stored chunk by chunk, so that no queue is too small."""
    for keys in docs:
        for n in range(STEPS, len(keys) + STEPS, STEPS):
            assert put(store, keys[:n]) <= 1
            assert store.drain(10.0)
    push_out(store)
    assert all(store.lookup(keys) == 0 for keys in docs)


# --- RAM alone


def test_what_was_stored_comes_back(store: TieredStore) -> None:
    assert put(store, A[:22]) == 6
    for n in range(33):
        assert get(store, A[:n]) == min(n, 22)
    assert get(store, A[5:], 5) == 17


def test_empty_prompt(store: TieredStore) -> None:
    assert store.lookup([]) == 0
    assert get(store, []) == 0
    assert put(store, []) == 0
    ticket = store.stage([])
    assert ticket.done
    assert store.settle(ticket, 0.0)
    ticket.close()


def test_store_without_tiers() -> None:
    store = open_store()
    put(store, A)
    assert bring(store, A) == 32
    assert store.drain(0.0)
    store.close()


def test_prompt_longer_than_ram(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=4)
    keys = keys_of("long", 50)
    assert put(store, keys) == 4
    assert get(store, keys) == 16
    store.drain(10.0)
    assert put(store, keys) == 0
    assert get(store, keys) == 16
    store.ram.check()
    store.close()


def test_ram_full_of_pinned_chunks_takes_nothing(store: TieredStore) -> None:
    keys = keys_of("full", 128)
    put(store, keys)
    store.drain(10.0)
    with store.acquire(keys) as lease:
        assert lease.steps == 128
        assert put(store, A) == 0
        assert bring(store, A) == 0
        check_bytes(store, lease, keys)
    assert put(store, A) == 8


def test_store_needs_room_for_two_chunks() -> None:
    with pytest.raises(ValueError, match=r"LMC_RAM_GB: .* hold fewer than two chunks .* it takes"):
        open_store(num_chunks=1)
    open_store(num_chunks=2).close()


def test_memory_that_cannot_be_had_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"LMC_RAM_GB: .*memory"):
        TieredStore(LAYOUT, NAMESPACE, 1 << 60)


def test_snapshot(store: TieredStore) -> None:
    put(store, A)
    store.drain(10.0)
    assert store.snapshot() == {
        "memory.written": 8,
        "ram.stored": 8,
        "ram.slots": 32,
        "ram.free_slots": 24,
        "ram.idle_slots": 8,
        "ram.evictions": 0,
        "staged_slots": 0,
        "warming": 0,
        "spill_queue_bytes": 0,
    }


# --- down and up again


def test_chunks_come_back_from_below(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A[:30])
    ticket = store.stage(A)
    assert not ticket.done
    assert store.lookup(A) == 0  # never from below
    assert store.settle(ticket, 10.0)
    assert get(store, A) == 30
    assert store.snapshot()["staged_slots"] == 8
    ticket.close()
    ticket.close()
    assert store.snapshot()["staged_slots"] == 0
    assert store.stats.count("memory.hit") == 8
    assert below.calls["read"] == 8


def test_nothing_below_either(store: TieredStore) -> None:
    assert bring(store, A) == 0


def test_only_what_ram_lacks_is_fetched(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A)
    put(store, A[:16])
    store.drain(10.0)
    assert bring(store, A) == 32
    assert below.calls["read"] == 4


def test_tail_in_ram_is_replaced_by_the_whole_chunk_from_below(store: TieredStore) -> None:
    put_below(store, A[:8])
    put(store, A[:6])
    store.drain(10.0)
    assert bring(store, A) == 8


def test_tails_name_leads_to_the_longer_chunk(store: TieredStore, below: FaultyTier) -> None:
    put(store, A[:6])
    put(store, A[:8])
    store.drain(10.0)
    push_out(store)
    assert bring(store, A[:6]) == 6
    assert get(store, A) == 8  # all of it came


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_tail_has_its_name_below_though_a_longer_chunk_was_there_first(
    kind: str, tmp_path: Path
) -> None:
    """An engine's copies may end in any order."""
    tier = MemoryTier() if kind == "memory" else DiskTier(tmp_path, 10**9)
    store = open_store(tier)
    leases = [store.reserve(chunks_of(A[:n])) for n in (6, 8)]
    for lease in leases:
        fill(store, lease)
    for lease in reversed(leases):
        lease.commit()
    store.ram.check()
    assert store.drain(10.0)
    store.ram.check()
    push_out(store)
    assert bring(store, A[:6]) == 6
    store.close()


def test_covered_tail_that_no_tier_takes_is_gone_at_once() -> None:
    store = open_store(MemoryTier(), queue_bytes=0)
    leases = [store.reserve(chunks_of(A[:n])) for n in (6, 8)]
    for lease in reversed(leases):
        fill(store, lease)
        lease.commit()
    store.ram.check()
    assert get(store, A) == 8
    store.close()


def test_tail_is_found_by_probing_the_first_missing_chunk_only(
    store: TieredStore, below: FaultyTier
) -> None:
    put_below(store, A[:7])
    for n in range(1, 8):
        assert bring(store, [*A[:7], *B[7:]][: n + 8]) == (7 if n + 8 > 7 else n)
        push_out(store)
    assert bring(store, A[:6]) == 4  # lower tiers know names of chunks and tails only


def test_all_in_ram_waits_for_no_tier(store: TieredStore, below: FaultyTier) -> None:
    put(store, A)
    store.drain(10.0)
    hang = threading.Event()
    below.plan("probe", Fault(hang=hang))
    ticket = store.stage(A)
    assert ticket.done
    hang.set()
    store.drain(10.0)
    assert below.calls["probe"]  # but it heard of the use
    ticket.close()


def test_use_in_ram_is_a_use_below(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10**9)
    store = open_store(tier, num_chunks=64)
    put(store, A[:8])
    store.drain(10.0)
    put(store, B[:8])
    store.drain(10.0)
    store.stage(A[:8]).close()
    store.drain(10.0)
    names = [NAMESPACE.fold(key) for key in (B[7], B[3], A[7], A[3])]
    assert [tier._names[inode] for inode in tier._names] == names
    store.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_restart(kind: str, tmp_path: Path) -> None:
    tier = Below(persistent=True) if kind == "memory" else DiskTier(tmp_path, 10**9)
    store = open_store(tier, num_chunks=64)
    put(store, A[:30])
    store.close() if kind == "disk" else store.drain(10.0)
    again = open_store(tier if kind == "memory" else DiskTier(tmp_path, 10**9), num_chunks=64)
    assert bring(again, A) == 30
    again.close()
    store.close()


def test_spill_is_cut_to_what_the_queue_takes() -> None:
    """A prompt that is larger than the queue keeps its beginning."""
    below = FaultyTier(MemoryTier())
    hang = threading.Event()
    below.plan("write", Fault(hang=hang))
    store = open_store(below, num_chunks=16)
    put(store, keys_of("long", 64))
    hang.set()
    store.drain(10.0)
    assert store.stats.count("memory.dropped.queue_full") == 3
    push_out(store)
    assert bring(store, keys_of("long", 64)) == 16
    store.close()


@pytest.mark.parametrize("num_chunks", [2, 3, 5, 8, 9])
def test_small_ram_spills_too(num_chunks: int) -> None:
    store = open_store(MemoryTier(), num_chunks=num_chunks)
    put(store, A[: STEPS * num_chunks])
    store.drain(10.0)
    assert store.stats.count("memory.written") >= 1
    push_out(store)
    assert bring(store, A) >= STEPS
    store.close()


def test_queue_of_no_bytes_writes_nothing() -> None:
    store = open_store(MemoryTier(), queue_bytes=0)
    put(store, A)
    assert store.stats.count("memory.dropped.queue_full")
    assert store.drain(0.0)
    store.close()


def test_chunk_keeps_its_bytes_until_it_has_landed(store: TieredStore, below: FaultyTier) -> None:
    hang = threading.Event()
    below.plan("write", Fault(hang=hang))
    put(store, A[:8])
    wait_until(lambda: below.calls["write"])
    push_out(store)  # would take every idle slot
    put(store, B)
    hang.set()
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 8


# --- several tiers


def test_what_the_first_tier_lacks_comes_from_the_next() -> None:
    first, second = FaultyTier(Below("first")), FaultyTier(Below("second"))
    store = open_store(first, second, num_chunks=64)
    put_below(store, A[:30])
    lost = [NAMESPACE.fold(key) for key in (A[19], A[29])]
    for name in lost:
        first.forget(name)
    assert bring(store, A) == 30
    assert store.stats.count("first.hit") == 4
    assert store.stats.count("second.hit") == 4
    second.forget(lost[0])
    push_out(store)
    assert bring(store, A) == 16
    store.close()


def test_tail_above_and_whole_chunk_below() -> None:
    first, second = Below("first"), Below("second")
    store = open_store(first, second, num_chunks=64)
    put_below(store, A[:8])
    name = NAMESPACE.fold(A[7])
    first.forget(name)
    put(store, A[:6])
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 8
    store.ram.check()
    store.close()


def test_failing_first_tier_does_not_hide_the_next() -> None:
    first, second = FaultyTier(Below("first")), FaultyTier(Below("second"))
    store = open_store(first, second, num_chunks=64)
    put_below(store, A)
    first.plan("probe", Fault(error=EIO), times=None)
    for _ in range(MAX_ERRORS + 2):
        assert bring(store, A) == 32
        push_out(store)
    assert store.stats.count("first.error.EIO") == MAX_ERRORS
    assert store.stats.count("first.skipped.resting")
    store.close()


# --- tickets


def test_identical_tickets_fetch_once(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A)
    below.plan("read", Fault(delay_s=0.01), times=None)
    tickets = [store.stage(A) for _ in range(5)]
    for ticket in tickets:
        assert store.settle(ticket, 10.0)
    assert below.calls["read"] == 8
    assert store.stats.count("memory.hit") == 8
    assert store.snapshot()["staged_slots"] == 8
    for ticket in tickets[:-1]:
        ticket.close()
    push_out(store)
    assert get(store, A) == 32  # the last one still holds them
    tickets[-1].close()


def test_tickets_that_share_a_beginning(store: TieredStore, below: FaultyTier) -> None:
    fork = keys_of("fork", 24, after=A[:16])
    put_below(store, A, fork)
    tickets = [store.stage(keys) for keys in (A, fork)]
    assert all(store.settle(ticket, 10.0) for ticket in tickets)
    assert (get(store, A), get(store, fork)) == (32, 24)
    assert below.calls["read"] == 10
    for ticket in tickets:
        ticket.close()


def test_what_arrives_for_a_closed_ticket_is_kept_but_not_held(
    store: TieredStore, below: FaultyTier
) -> None:
    put_below(store, A[:4])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    ticket = store.stage(A)
    poll_until(store, lambda: below.calls["read"])
    ticket.close()
    assert ticket.done
    hang.set()
    store.drain(10.0)
    assert get(store, A) == 4
    assert store.ram.num_idle == 1


def test_ticket_closed_while_the_tier_is_asked(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A)
    hang = threading.Event()
    below.plan("probe", Fault(hang=hang))
    ticket = store.stage(A)
    ticket.close()
    hang.set()
    store.drain(10.0)
    assert below.calls["read"] == 0


def read_one_by_one(below: FaultyTier, keys: Sequence[Key]) -> tuple[TieredStore, threading.Event]:
    """A store that reads one chunk at a time, and what lets the first one through."""
    store = open_store(below, num_chunks=16, io_threads=1)
    put_below(store, keys)
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    return store, hang


def test_what_nobody_waits_for_any_more_is_not_read(below: FaultyTier) -> None:
    store, hang = read_one_by_one(below, A)
    ticket = store.stage(A)
    poll_until(store, lambda: below.calls["read"])
    assert ticket.remaining == 8
    ticket.close()
    hang.set()
    assert store.drain(10.0)
    assert below.calls["read"] == 1
    assert store.stats.count("memory.miss.unwanted") == 7
    assert get(store, A) == 4
    store.ram.check()
    store.close()


def test_what_another_still_waits_for_is_read(below: FaultyTier) -> None:
    store, hang = read_one_by_one(below, A)
    gone, waiting = store.stage(A), store.stage(A[:16])
    poll_until(store, lambda: below.calls["read"] and waiting.remaining == 4)
    gone.close()
    hang.set()
    assert store.settle(waiting, 10.0)
    assert store.drain(10.0)
    assert get(store, A) == 16
    assert below.calls["read"] == 4
    waiting.close()
    store.close()


def test_who_joins_as_a_read_is_given_up_gets_it(below: FaultyTier) -> None:
    store, hang = read_one_by_one(below, A[:8])
    gone = store.stage(A[:8])
    poll_until(store, lambda: below.calls["read"])
    gone.close()
    hang.set()
    wait_until(lambda: store._done._done.qsize() == 2)  # the store has not heard of it yet
    late = store.stage(())
    store._fetching[A[7]].append(late)
    late._coming.add(A[7])
    assert store.settle(late, 10.0)
    assert late.arrived == 1
    assert get(store, A) == 8
    assert store.stats.count("memory.miss.unwanted") == 0
    late.close()
    store.close()


def test_what_a_ticket_too_old_waits_for_is_still_read(
    below: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request may come yet."""
    store, hang = read_one_by_one(below, A)
    ticket = store.stage(A)
    poll_until(store, lambda: below.calls["read"])
    monkeypatch.setattr(module, "TICKET_LIFE_S", 0.0)
    store.poll()
    assert ticket.closed
    hang.set()
    assert store.drain(10.0)
    assert get(store, A) == 32
    store.close()


def test_settle_waits_no_longer_than_told(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A[:4])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    ticket = store.stage(A)
    started = time.monotonic()
    assert not store.settle(ticket, 0.05)
    assert time.monotonic() - started < 5
    assert not store.settle(ticket, 0.0)
    assert store.lookup(A) == 0
    hang.set()
    assert store.settle(ticket, 10.0)
    ticket.close()


def test_staging_holds_at_most_half_of_ram(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=8)
    put_below(store, A, B)
    first = store.stage(A)
    assert store.settle(first, 10.0)
    assert store.snapshot()["staged_slots"] == 4
    assert get(store, A) == 16  # cut to what fits
    second = store.stage(B)
    assert not store.settle(second, 0.1)  # waits for room
    assert put(store, C) == 4  # the other half is free for those who compute
    first.close()
    assert store.settle(second, 10.0)
    assert get(store, B) == 16
    second.close()
    store.drain(10.0)
    store.ram.check()
    store.close()


def test_what_another_request_brings_takes_no_more_room(below: FaultyTier) -> None:
    """Two requests for the same half of RAM: both get all of it, on its way or there already."""
    store = open_store(below, num_chunks=8)
    put_below(store, A[:16])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))  # one of four; a thread is left for the others
    first = store.stage(A[:16])
    poll_until(store, lambda: store._num_fetching == 1)
    second = store.stage(A[:16])
    poll_until(store, lambda: len(second._coming) == 1)
    hang.set()
    assert store.settle(second, 10.0)
    third = store.stage(A[:16])
    assert store.settle(third, 10.0)
    assert store.snapshot()["staged_slots"] == 4
    first.close()
    second.close()
    assert get(store, A[:16]) == 16
    third.close()
    store.drain(10.0)
    store.ram.check()
    store.close()


def test_room_is_given_in_the_order_of_arrival(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=8)
    docs = [keys_of(n, 16) for n in range(4)]
    put_below(store, *docs)
    hang = threading.Event()
    below.plan("probe", Fault(hang=hang))  # the first is answered last
    tickets = [store.stage(keys) for keys in docs]
    assert store.settle(tickets[1], 10.0)
    poll_until(store, lambda: len(store._queue) == 2)
    hang.set()
    poll_until(store, lambda: len(store._queue) == 3)
    order: list[int] = []
    while len(order) < 4:
        (n,) = [n for n, ticket in enumerate(tickets) if ticket.done and not ticket.closed]
        order.append(n)
        assert get(store, docs[n]) == 16
        tickets[n].close()
        store.drain(10.0)
    assert order == [1, 0, 2, 3]
    store.close()


def test_half_of_ram_is_never_passed_while_chunks_of_old_weights_come(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=8)
    put_below(store, A[:16])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang), times=2)
    store.stage(A[:16])
    poll_until(store, lambda: below.calls["read"] == 2)
    store.renew()
    assert store._num_fetching == 4
    hang.set()
    store.drain(10.0)
    assert store._num_fetching == 0
    store.ram.check()
    store.close()


def test_forgotten_ticket_is_let_go_after_a_minute(
    store: TieredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_below(store, A)
    ticket = store.stage(A)
    store.settle(ticket, 10.0)
    store.poll()
    assert store.snapshot()["staged_slots"] == 8
    ticket.created -= TICKET_LIFE_S + 1
    store.poll()
    assert ticket.closed
    assert store.snapshot()["staged_slots"] == 0
    assert get(store, A) == 32


def test_chunk_an_engine_is_storing_is_not_fetched(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A[:8])
    lease = store.reserve(chunks_of(A[:8]))
    ticket = store.stage(A[:8])
    assert store.settle(ticket, 10.0)
    assert below.calls["read"] == 0
    fill(store, lease)
    lease.commit()
    assert get(store, A) == 8
    ticket.close()


def test_chunk_stored_while_it_is_being_fetched(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A[:8])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang), times=2)
    ticket = store.stage(A[:6] + A[6:8])
    poll_until(store, lambda: below.calls["read"] == 2)
    assert put(store, A[:8]) == 0  # on its way already
    hang.set()
    assert store.settle(ticket, 10.0)
    assert get(store, A) == 8
    ticket.close()


def test_longer_chunk_stored_while_its_tail_is_being_fetched(
    store: TieredStore, below: FaultyTier
) -> None:
    put_below(store, A[:6])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang), times=2)
    ticket = store.stage(A[:6])
    poll_until(store, lambda: below.calls["read"] == 2)
    assert put(store, A[:8]) == 1
    hang.set()
    assert store.settle(ticket, 10.0)
    assert get(store, A) == 8
    store.ram.check()
    ticket.close()


def test_own_chain_is_not_evicted_by_what_is_fetched_for_it(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=8)
    for n in range(STEPS, 33, STEPS):
        put(store, A[:n])
        store.drain(10.0)
    push_out(store)
    put(store, A[:16])
    store.drain(10.0)
    put(store, B[:16])
    store.drain(10.0)
    assert bring(store, A) == 32
    store.close()


# --- weights that change


def test_nothing_is_found_after_the_weights_changed(store: TieredStore, below: FaultyTier) -> None:
    put(store, A)
    store.drain(10.0)
    store.renew()
    assert store.namespace.private
    assert bring(store, A) == 0
    put(store, A)
    assert get(store, A) == 32
    assert store.stats.count("generations") == 1


def test_renew_with_everything_in_flight(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A, B)
    hang = threading.Event()
    below.plan("read", Fault(hang=hang), times=2)
    below.plan("write", Fault(hang=hang))
    fetching, waiting = store.stage(A), store.stage(B)
    poll_until(store, lambda: below.calls["read"] == 2)
    put(store, C[:8])
    reading = store.acquire(C)
    writing = store.reserve(chunks_of(C[:16]))
    fill(store, writing)
    store.renew()
    store.ram.check()
    assert fetching.closed
    assert waiting.closed
    again = store.stage(A)
    check_bytes(store, reading, C)
    hang.set()
    assert store.settle(again, 10.0)
    store.drain(10.0)
    store.ram.check()
    assert [store.lookup(keys) for keys in (A, B, C)] == [0, 0, 0]
    check_bytes(store, reading, C)
    writing.commit()
    reading.release()
    again.close()
    assert store.lookup(C) == 0
    assert put(store, C) == 8
    assert get(store, C) == 32


def test_same_chunk_is_fetched_anew_while_the_old_one_is_still_coming() -> None:
    """Tiers that do not outlive the process serve a private namespace too."""
    below = FaultyTier(MemoryTier())
    store = open_store(below, num_chunks=32)
    put_below(store, A[:4])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    store.stage(A[:4])
    poll_until(store, lambda: below.calls["read"])
    store.renew()
    put(store, A[:4])
    store.drain(0.2)
    push_out(store)
    assert bring(store, A) == 4
    hang.set()
    store.drain(10.0)
    assert get(store, A) == 4
    store.ram.check()
    store.close()


def test_private_namespace_keeps_away_from_tiers_that_last(tmp_path: Path) -> None:
    lasting, fleeting = FaultyTier(DiskTier(tmp_path, 10**9)), FaultyTier(Below("fleeting"))
    store = open_store(lasting, fleeting, num_chunks=64)
    store.renew()
    put(store, A)
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 32
    assert lasting.calls.total() == 0
    assert store.stats.count("fleeting.hit") == 8
    store.close()


def test_private_from_the_start(tmp_path: Path) -> None:
    lasting = FaultyTier(DiskTier(tmp_path, 10**9))
    store = TieredStore(LAYOUT, NAMESPACE.next_generation(), slots(16), [lasting])
    put(store, A[:16])
    assert store.drain(0.0)
    assert bring(store, A) == 16
    store.close()
    assert lasting.calls == {"close": 1}


def test_flush_keeps_what_was_stored(store: TieredStore) -> None:
    """An engine's flush is no change of weights: it does not reach the store at all."""
    put(store, A)
    assert get(store, A) == 32


# --- faults below: each is a miss with a cause, never wrong bytes, and stored again afterwards


def _copy_of(folder: Path, namespace: Namespace, layout: KVLayout, keys: list[Key]) -> bytes:
    """The file another model's store would write for these keys."""
    store = TieredStore(layout, namespace, 1 << 20, [DiskTier(folder, 10**9)])
    lease = store.reserve(chunks_of(keys))
    lease.commit()
    store.close()
    return next(folder.glob("chunks/*/*")).read_bytes()


def _damage(kind: str, files: list[Path], tmp_path: Path) -> None:
    first, second = files
    data = bytearray(first.read_bytes())
    other = Namespace.of({"model": "other"})
    layout = KVLayout(16, 64, (96, 32, 112))
    match kind:
        case "flipped bit in the payload":
            data[4096 + 77] ^= 4
        case "flipped bit in the header":
            data[90] ^= 4
        case "flipped bit in the version":
            data[8] ^= 4
        case "truncated in the payload":
            del data[-100:]
        case "truncated in the header":
            del data[100:]
        case "truncated to nothing":
            data.clear()
        case "longer":
            data += bytes(4096)
        case "zeros":
            data[:] = bytes(len(data))
        case "swapped":
            data[:] = second.read_bytes()
            second.write_bytes(first.read_bytes())
        case "another model":
            data[:] = _copy_of(tmp_path / "x", other, LAYOUT, A[:4])
        case "another layout":
            data[:] = _copy_of(tmp_path / "x", NAMESPACE, layout, A[:4])
        case "removed":
            first.unlink()
            return
    first.write_bytes(data)


DAMAGES = {
    "flipped bit in the payload": "checksum",
    "flipped bit in the header": "header",
    "flipped bit in the version": "version",
    "truncated in the payload": "truncated",
    "truncated in the header": "truncated",
    "truncated to nothing": "absent",
    "longer": "size",
    "zeros": "magic",
    "swapped": "key",
    "another model": "namespace",
    "another layout": "layout",
    "removed": "absent",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "tier"
    store = open_store(DiskTier(root, 10**9), num_chunks=64)
    put_below(store, A[:8])
    paths = [root / "chunks" / n[:2] / n for n in (NAMESPACE.fold(A[i]).hex() for i in (3, 7))]
    _damage(kind, paths, tmp_path)
    assert bring(store, A) == 0
    cause = DAMAGES[kind]
    assert store.stats.count(f"disk.miss.{cause}") == (2 if kind == "swapped" else 1)
    assert sum(n for name, n in store.snapshot().items() if ".miss." in name) == (
        2 if kind == "swapped" else 1
    )
    push_out(store)
    assert bring(store, A) == 0  # whatever it was has been forgotten
    assert put(store, A[:8]) >= 1
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 8
    store.close()
    again = open_store(DiskTier(root, 10**9), num_chunks=64)
    assert bring(again, A) == 8
    again.close()


def test_damage_in_the_middle_of_a_chain_keeps_what_is_before(tmp_path: Path) -> None:
    store = open_store(DiskTier(tmp_path, 10**9), num_chunks=64)
    put_below(store, A)
    name = NAMESPACE.fold(A[15]).hex()
    path = tmp_path / "chunks" / name[:2] / name
    data = bytearray(path.read_bytes())
    data[4500] ^= 1
    path.write_bytes(data)
    assert bring(store, A) == 12
    assert store.stats.count("disk.miss.checksum") == 1
    assert put(store, A) >= 1
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 32
    store.close()


def test_other_formats_live_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is part of every name: what a newer lmc wrote is not found, and stays."""
    monkeypatch.setattr("lmc.keys.FORMAT_VERSION", 2)
    monkeypatch.setattr("lmc.tiers.frame.FORMAT_VERSION", 2)
    newer = Namespace.of({"model": "test"})
    store = TieredStore(LAYOUT, newer, slots(16), [DiskTier(tmp_path, 10**9)])
    put(store, A[:8])
    store.close()
    files = {path: path.read_bytes() for path in tmp_path.glob("chunks/*/*")}
    assert len(files) == 2
    monkeypatch.undo()
    assert newer != NAMESPACE
    ours = open_store(DiskTier(tmp_path, 10**9))
    assert bring(ours, A) == 0
    put(ours, A[:8])
    ours.close()
    assert all(path.read_bytes() == data for path, data in files.items())
    assert len(list(tmp_path.glob("chunks/*/*"))) == 4


@pytest.mark.parametrize("where", [".", "chunks"])
def test_missing_directory(where: str, tmp_path: Path) -> None:
    root = tmp_path / "tier"
    store = open_store(DiskTier(root, 10**9), num_chunks=64)
    put_below(store, A)
    shutil.rmtree(root / where)
    assert bring(store, A) == 0
    assert store.stats.count("disk.miss.absent") >= 1
    for _ in range(8):  # each look finds one more gone
        bring(store, A)
    put(store, A)
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 32
    store.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_file_that_cannot_be_opened(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(DiskTier(tmp_path, 10**9), num_chunks=64)
    put_below(store, A[:4])
    with monkeypatch.context() as patch:
        patch.setattr("os.open", _fail(code))
        assert bring(store, A) == 0
    assert store.stats.count(f"disk.error.{errno.errorcode[code]}") == 1
    assert store.stats.count("disk.miss.error") == 1
    if code in (errno.EACCES, errno.EIO):
        assert bring(store, A) == 0
        put(store, A[:4])
        store.drain(10.0)
        push_out(store)
    assert bring(store, A) == 4
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS])
def test_file_that_cannot_be_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(DiskTier(tmp_path, 10**9), num_chunks=64)
    with monkeypatch.context() as patch:
        patch.setattr("os.open", _fail(code))
        put(store, A[:4])
        store.drain(10.0)
    assert store.stats.count(f"disk.error.{errno.errorcode[code]}") == 1
    assert get(store, A) == 4  # RAM has it all the same
    push_out(store)
    assert bring(store, A) == 0
    put(store, A[:4])
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 4
    store.close()


def _fail(code: int) -> Any:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, "injected")

    return fail


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(error=EIO), "error"),
        (Fault(error=SystemExit()), "error"),
        (Fault(lose=True), "absent"),
        (Fault(cut=0), "absent"),
        (Fault(cut=5000), "truncated"),
        (Fault(flip_bit=0), "magic"),
        (Fault(flip_bit=8 * 4096), "checksum"),
        (Fault(swap=True), "key"),
    ],
)
def test_fault_in_a_read(store: TieredStore, below: FaultyTier, fault: Fault, cause: str) -> None:
    put_below(store, A[:4], B[:4])
    below.plan("read", fault)
    assert bring(store, A) == 0
    assert store.stats.count(f"memory.miss.{cause}") == 1
    put(store, A[:4])
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 4


@pytest.mark.parametrize(
    "fault", [Fault(cut=4100), Fault(flip_bit=100), Fault(flip_bit=8 * 4096 + 5), Fault(lose=True)]
)
def test_fault_in_a_write(store: TieredStore, below: FaultyTier, fault: Fault) -> None:
    below.plan("write", fault)
    put_below(store, A[:4])
    assert bring(store, A) == 0
    put(store, A[:4])
    store.drain(10.0)
    push_out(store)
    assert bring(store, A) == 4


def test_error_while_forgetting_what_was_damaged(store: TieredStore, below: FaultyTier) -> None:
    put_below(store, A[:4])
    below.plan("read", Fault(flip_bit=8 * 4096))
    below.plan("forget", Fault(error=EIO))
    assert bring(store, A) == 0
    assert store.stats.count("memory.miss.error") == 1
    assert bring(store, A) == 4


def test_tier_that_says_it_has_what_it_has_not(store: TieredStore, below: FaultyTier) -> None:
    class Liar(MemoryTier):
        def probe(self, names: Any) -> int:
            return len(names)

    below._tier = Liar()
    assert bring(store, A) == 0
    assert store.stats.count("memory.miss.absent") >= 1


def test_hanging_tier_costs_later_requests_nothing(
    store: TieredStore, below: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_below(store, A[:4], B[:4])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    stuck = store.stage(A[:4])
    other = store.stage(B[:4])
    assert store.settle(other, 10.0)
    monkeypatch.setattr(guard, "JOB_TIMEOUT_S", 0.0)
    assert not stuck.done
    joined = store.stage(A[:4])
    assert joined.done
    assert store.stats.count("memory.rested.timeout") == 1
    assert store.stats.count("memory.skipped.resting") == 1
    monkeypatch.undo()
    hang.set()
    assert store.settle(stuck, 10.0)
    assert get(store, A) == 4  # the memory it was lent was kept for it
    for ticket in (stuck, other, joined):
        ticket.close()


def test_nobody_joins_a_fetch_that_hangs(
    store: TieredStore, below: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier began to hang after this request had asked it."""
    put_below(store, A[:4])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    stuck = store.stage(A[:4])
    poll_until(store, lambda: below.calls["read"])
    later = store.stage(A[:4])
    wait_until(lambda: store._done._done.qsize())
    monkeypatch.setattr(guard, "JOB_TIMEOUT_S", 0.0)
    store.poll()
    assert later.done
    hang.set()
    monkeypatch.undo()
    assert store.settle(stuck, 10.0)
    for ticket in (stuck, later):
        ticket.close()


def test_read_refused_by_a_tier_that_has_just_begun_to_rest(
    store: TieredStore, below: FaultyTier
) -> None:
    put_below(store, A[:8])
    ticket = store.stage(A[:8])
    wait_until(lambda: store._done._done.qsize())
    store._guards[0]._rest("for a test", "errors")
    store.poll()
    assert ticket.done
    assert store.lookup(A) == 0
    store.ram.check()
    ticket.close()


# --- end


def test_drain_tells_whether_all_has_landed(store: TieredStore, below: FaultyTier) -> None:
    hang = threading.Event()
    below.plan("write", Fault(hang=hang))
    put(store, A)
    assert not store.drain(0.05)
    hang.set()
    assert store.drain(10.0)


def test_close_lets_queued_writes_land(tmp_path: Path) -> None:
    faulty = FaultyTier(DiskTier(tmp_path, 10**9))
    faulty.plan("write", Fault(delay_s=0.02), times=None)
    store = open_store(faulty, num_chunks=64)
    put(store, A)
    store.close(10.0)
    assert faulty.calls["write"] == 8
    again = open_store(DiskTier(tmp_path, 10**9), num_chunks=64)
    assert bring(again, A) == 32
    again.close()


def test_close_gives_up_what_does_not_land_in_time() -> None:
    faulty = FaultyTier(MemoryTier())
    faulty.plan("write", Fault(delay_s=0.3))
    store = open_store(faulty, num_chunks=128, io_threads=1)
    put(store, keys_of("long", 128))
    wait_until(lambda: faulty.calls["write"])
    store.close(0.0)
    assert store.stats.count("memory.dropped.closing") == 3
    store.ram.check()
    assert store.ram.num_idle == 32


def test_close_with_everything_open(below: FaultyTier) -> None:
    store = open_store(below, num_chunks=32)
    put_below(store, A, B)
    below.plan("read", Fault(delay_s=0.05), times=None)
    ticket, later = store.stage(A), store.stage(B)
    store.poll(1.0)
    put(store, C)
    reading, writing = store.acquire(C), store.reserve(chunks_of(keys_of("d", 8)))
    store.close(10.0)
    assert ticket.closed
    assert later.closed
    reading.release()
    writing.abort()
    store.ram.check()
    assert below.calls["close"] == 1


def test_close_twice(below: FaultyTier) -> None:
    store = open_store(below)
    store.close()
    store.close()
    assert below.calls["close"] == 1


def test_close_does_not_wait_for_a_hanging_tier_and_leaves_it_its_memory(
    below: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_GRACE_S", 0.05)
    store = open_store(below)
    put_below(store, A[:8])
    hang = threading.Event()
    below.plan("read", Fault(hang=hang))
    store.stage(A)
    poll_until(store, lambda: below.calls["read"] == 2)
    started = time.monotonic()
    store.close(0.1)
    assert time.monotonic() - started < 10
    hang.set()  # it writes into memory that must still be there
    wait_until(lambda: below.calls["close"])
    store._done.run()
    store.ram.check()


def test_two_tiers_share_the_time_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_GRACE_S", 0.05)
    hang = threading.Event()
    tiers = [FaultyTier(Below(name)) for name in ("first", "second")]
    store = open_store(*tiers)
    for tier in tiers:
        tier.plan("write", Fault(hang=hang), times=None)
    put(store, A[:4])
    started = time.monotonic()
    store.close(0.5)
    assert time.monotonic() - started < 0.9
    hang.set()
    wait_until(lambda: all(tier.calls["close"] for tier in tiers))
    while store._done.run():
        pass
    store.ram.check()


def test_group_size_is_as_documented() -> None:
    assert module.SPILL_GROUP == 8
    below = FaultyTier(MemoryTier())
    store = open_store(below, num_chunks=256)
    put(store, keys_of("long", 20 * STEPS))
    store.drain(10.0)
    assert below.calls["write"] == 20
    assert below.calls["probe"] == 3
    store.close()


def test_core_imports_without_torch_and_without_an_engine() -> None:
    program = """
import sys
for name in ("torch", "numpy", "sglang", "vllm"):
    sys.modules[name] = None
import lmc, lmc.config, lmc.store, lmc.keys, lmc.layout, lmc.stats
import lmc.tiers, lmc.tiers.disk, lmc.tiers.guard, lmc.tiers.ram
from lmc.keys import Namespace
from lmc.layout import KVLayout
store = lmc.store.TieredStore(KVLayout(16, 64, (64,)), Namespace.of({}), 1 << 20)
store.close()
foreign = {n.split(".")[0] for n in sys.modules} - set(sys.stdlib_module_names) - {"__main__"}
print(sorted(n for n in foreign if sys.modules.get(n) and not n.startswith("_")))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "torch" not in answer.stdout
    assert answer.stdout.strip() in ("['lmc', 'xxhash']", "['lmc', 'sitecustomize', 'xxhash']")
