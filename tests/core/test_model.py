"""A random life of the store: whatever happens, a lease shows the bytes its keys name, computed by
the weights of its time; no slot is lost; and what works gives back what it was given.

A chunk's payload is a function of its keys and the weights, so any reader can tell right from
wrong. Rules that go a chunk's whole way in one step make the test sharp: random steps alone seldom
come so far.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lmc.store import Ticket, TieredStore
from lmc.testing import Fault, FaultyTier, MemoryTier
from lmc.tiers.disk import DiskTier
from tests.core.chunks import (
    LAYOUT,
    NAMESPACE,
    STEPS,
    check_bytes,
    chunks_of,
    fill,
    keys_of,
    push_out,
    put,
    slots,
)

if TYPE_CHECKING:
    from lmc.keys import Key
    from lmc.tiers.ram import ReadLease, WriteLease


class Shown(list["Key"]):
    """Keys that a failing example shows by a name."""

    def __init__(self, keys: list[Key], name: str) -> None:
        super().__init__(keys)
        self.name = name

    def __repr__(self) -> str:
        return self.name


NUM_SLOTS = 10
DISK_BYTES = 14 * 8192
STEM = keys_of("stem", 28)
DOCUMENTS = {
    "stem": STEM,
    "early": keys_of("early", 28, after=STEM[:3]),  # diverges inside the first chunk
    "edge": keys_of("edge", 28, after=STEM[:8]),  # between two chunks
    "late": keys_of("late", 28, after=STEM[:10]),
    "other": keys_of("other", 60),  # longer than RAM
}
FAULTS = [
    Fault(error=OSError(errno.EIO, "injected")),
    Fault(error=SystemExit()),
    Fault(delay_s=0.002),
    Fault(lose=True),
    Fault(cut=0),
    Fault(cut=4500),
    Fault(flip_bit=333),
    Fault(flip_bit=8 * 4200),
    Fault(swap=True),
]
documents = st.sampled_from([Shown(keys, name) for name, keys in DOCUMENTS.items()])
lengths = st.integers(0, 30) | st.just(60)
numbers = st.integers(0, 9)
damages = st.sampled_from(["flip", "cut", "empty", "swap", "gone"])


@dataclass
class Reading:
    lease: ReadLease
    keys: list[Key]
    start: int
    weights: int


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.serial = 0
        self.open()

    def open(self) -> None:
        self.gate = threading.Event()
        self.weights = 0
        self.reads: list[Reading] = []
        self.writes: list[WriteLease] = []
        self.tickets: list[Ticket] = []
        self.disk = FaultyTier(DiskTier(self.folder, DISK_BYTES))
        self.memory = FaultyTier(MemoryTier())
        self.store = TieredStore(
            LAYOUT, NAMESPACE, slots(NUM_SLOTS), [self.disk, self.memory], io_threads=2
        )

    def check(self, reading: Reading) -> None:
        check_bytes(self.store, reading.lease, reading.keys, reading.start, reading.weights)

    # --- what an engine does

    @rule(keys=documents, n=lengths, skip=st.integers(0, 2))
    def reserve(self, keys: list[Key], n: int, skip: int) -> None:
        lease = self.store.reserve(chunks_of(keys[:n])[skip:])
        fill(self.store, lease, self.weights)
        self.writes.append(lease)

    @precondition(lambda self: self.writes)
    @rule(n=numbers)
    def commit(self, n: int) -> None:
        self.writes.pop(n % len(self.writes)).commit()

    @precondition(lambda self: self.writes)
    @rule(n=numbers)
    def abort(self, n: int) -> None:
        self.writes.pop(n % len(self.writes)).abort()

    @rule(keys=documents, n=lengths, start=st.integers(0, 20))
    def acquire(self, keys: list[Key], n: int, start: int) -> None:
        wanted = keys[start:n]
        ready = self.store.lookup(wanted, start)
        lease = self.store.acquire(wanted, start)
        assert lease.steps == ready
        self.reads.append(Reading(lease, wanted, start, self.weights))
        self.check(self.reads[-1])

    @precondition(lambda self: self.reads)
    @rule(n=numbers)
    def release(self, n: int) -> None:
        reading = self.reads.pop(n % len(self.reads))
        self.check(reading)
        reading.lease.release()

    @rule(keys=documents, n=lengths, wait=st.booleans())
    def stage(self, keys: list[Key], n: int, wait: bool) -> None:
        ticket = self.store.stage(keys[:n])
        if wait:
            self.store.settle(ticket, 0.02)
        self.tickets.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(n=numbers)
    def close_ticket(self, n: int) -> None:
        ticket = self.tickets.pop(n % len(self.tickets))
        ticket.close()
        assert ticket.done

    @rule()
    def poll(self) -> None:
        self.store.poll(0.002)

    @rule()
    def warm(self) -> None:
        self.store.warm()

    @rule()
    def evict_all_idle(self) -> None:
        push_out(self.store)

    @precondition(lambda self: self.weights < 2)
    @rule(really=st.sampled_from([False, False, False, True]))
    def weights_change(self, really: bool) -> None:
        if really:
            self.store.renew()
            self.weights += 1
            assert all(self.store.lookup(keys) == 0 for keys in DOCUMENTS.values())
            assert all(ticket.closed for ticket in self.tickets)

    @rule(warm=st.booleans())
    def restart(self, warm: bool) -> None:
        self.finish()
        self.open()
        if warm:
            self.store.warm()

    # --- whole lives in one step

    @rule(n=st.integers(1, 8), damage=st.none() | damages, seed=numbers)
    def through_the_disk(self, n: int, damage: str | None, seed: int) -> None:
        """Store something new, evict it, damage it, stage, compare: where nothing is in the way and
        nothing is damaged, all of it comes back.
        """
        self.tiers_recover()
        assert self.store.drain(5.0)
        self.serial += 1
        keys = keys_of(self.serial, n)
        put(self.store, keys, self.weights)
        stored = self.store.lookup(keys)
        assert self.store.drain(5.0)
        push_out(self.store)
        if damage is not None:
            self.damage_one(damage, seed, [self.store.namespace.fold(key).hex() for key in keys])
        room = self.store.ram.num_free >= 2 and not self.store._staged and not self.store._queue
        ticket = self.store.stage(keys)
        assert self.store.settle(ticket, 5.0 if room else 0.02) or not room
        with self.store.acquire(keys) as lease:
            check_bytes(self.store, lease, keys, 0, self.weights)
            assert lease.steps == stored or damage is not None or not room
        ticket.close()

    @rule(keys=documents, n=st.integers(8, 28), more=st.integers(1, 9))
    def extend_when_full(self, keys: list[Key], n: int, more: int) -> None:
        """A chain that is in RAM stays there while it is extended."""
        put(self.store, keys[:n], self.weights)
        longer = keys[: n + more]
        whole = self.store.lookup(longer) // STEPS * STEPS
        lease = self.store.reserve(chunks_of(longer))
        assert self.store.lookup(longer) >= whole
        fill(self.store, lease, self.weights)
        lease.commit()
        assert self.store.lookup(longer) >= whole

    @rule(keys=documents, n=st.integers(1, 28), hang=st.booleans())
    def weights_change_in_flight(self, keys: list[Key], n: int, hang: bool) -> None:
        """Nothing that was on its way, up, down or into a slot, is seen with the new weights."""
        if self.weights >= 2:
            return
        if hang:
            self.memory.plan("read", Fault(hang=self.gate))
        lease = self.store.reserve(chunks_of(keys[:n]))
        fill(self.store, lease, self.weights)
        self.store.stage(keys)
        self.weights_change(really=True)
        lease.commit()
        self.store.poll(0.002)
        assert self.store.lookup(keys) == 0

    # --- what goes wrong

    @rule(
        verb=st.sampled_from(["probe", "read", "read", "write", "write", "hottest", "forget"]),
        fault=st.sampled_from(FAULTS),
        times=st.integers(1, 6),
        disk=st.booleans(),
    )
    def fault(self, verb: str, fault: Fault, times: int, disk: bool) -> None:
        (self.disk if disk else self.memory).plan(verb, fault, times=times)

    @rule(verb=st.sampled_from(["probe", "read", "write"]), disk=st.booleans())
    def hang(self, verb: str, disk: bool) -> None:
        (self.disk if disk else self.memory).plan(verb, Fault(hang=self.gate))

    @rule()
    def tiers_recover(self) -> None:
        self.gate.set()
        self.gate = threading.Event()
        for tier in (self.disk, self.memory):
            tier.heal()
        for guard in self.store._guards:
            guard._rest_until, guard._errors_in_a_row = 0.0, 0

    @rule(kind=damages, seed=numbers)
    def damage(self, kind: str, seed: int) -> None:
        self.damage_one(kind, seed, [path.name for path in self.folder.glob("chunks/*/*")])

    def damage_one(self, kind: str, seed: int, names: list[str]) -> None:
        """Damage one of these files; the tier may be writing or removing them meanwhile."""
        choose = random.Random(seed)
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            name = choose.choice(sorted(names))
            other = choose.choice(sorted(self.folder.glob("chunks/*/*")))
            path = self.folder / "chunks" / name[:2] / name
            data = bytearray(path.read_bytes())
            match kind:
                case "flip":
                    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
                case "cut":
                    del data[choose.randrange(len(data)) :]
                case "empty":
                    data.clear()
                case "swap":
                    swapped, data = data, bytearray(other.read_bytes())
                    other.write_bytes(swapped)
                case _:
                    path.unlink()
                    return
            path.write_bytes(data)

    @rule(what=st.sampled_from(["", "chunks", "aside"]))
    def folder_is_removed(self, what: str) -> None:
        shutil.rmtree(self.folder / what, ignore_errors=True)

    # --- what always holds

    @invariant()
    def nothing_is_lost(self) -> None:
        store = self.store
        store.ram.check()
        assert len(store._staged) + store._num_fetching <= store._max_staged
        for reading in self.reads:
            assert all(store.ram._pins[slot] for slot in reading.lease.slots)

    def finish(self) -> None:
        """End this process's life: give back what is held, and find every slot again."""
        self.gate.set()
        for tier in (self.disk, self.memory):
            tier.heal()
        for reading in self.reads:
            self.check(reading)
        self.store.close(10.0)
        for write in self.writes:
            write.abort()
        for reading in self.reads:
            reading.lease.release()
        ram = self.store.ram
        ram.check()
        assert not any(ram._pins), "a pin outlived its lease"
        assert ram.num_free + ram.num_idle == NUM_SLOTS, "a slot was lost"
        assert not self.store._fetching
        assert self.store._num_fetching == len(self.store._staged) == 0
        assert all(guard.write_bytes == 0 and not guard.busy for guard in self.store._guards)

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def live(num_lives: int, num_steps: int) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=num_lives,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_short_lives() -> None:
    live(200, 50)


@pytest.mark.slow
def test_many_lives() -> None:
    live(2000, 60)
