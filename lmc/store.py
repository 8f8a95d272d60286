"""The tiered store: RAM in front, slower tiers below. One thread owns it; pool threads only move
bytes it lent them.

Whatever `lookup` answers is committed in RAM, and `acquire` pins it there, so a promise made to an
engine cannot fail for I/O reasons. Lower tiers only feed RAM (`stage`) and are fed from it (a
commit).

    stage(keys) -> lookup(keys) -> acquire(keys) -> ReadLease.release()   a sequence comes back
    reserve(chunks) -> fill the slots -> WriteLease.commit()              a sequence is kept
    warm()                                                                once, after a start
    poll()                                                                once a scheduler step

`keys` are the keys of consecutive steps from absolute step `start` on; every answer counts steps.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .keys import Key, Name, Namespace, split_keys
from .stats import Stats
from .tiers.arena import FRAME_BYTES, Arena
from .tiers.frame import Damaged, check_payload, parse, seal, verify
from .tiers.guard import Completions, Guard
from .tiers.ram import Chunk, RamTier, ReadLease, WriteLease

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import KVLayout
    from .tiers.tier import Tier

SPILL_GROUP = 8
"""Chunks a spill job writes at most: few jobs for the owner, enough of them for the threads."""
WARM_LOOKS = 10_000
WARM_GROUP = 8
"""Blobs looked at after a start at most; chunks that one job of it reads."""
TICKET_LIFE_S = 10.0
"""Staged chunks nobody asked for are let go after this."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A chunk found below: it ends at absolute step `end` and begins at the chunk boundary
    before.
    """

    key: Key
    end: int
    parent: Key | None
    guard: Guard


_UNWANTED = "unwanted"
"""In place of a chunk: all who waited for it have gone."""


class Ticket:
    """One request's staging: what is on its way, and what has arrived and is held for it until
    `close`.
    """

    def __init__(self, store: TieredStore, keys: Sequence[Key], serial: int) -> None:
        self.keys = keys
        self.serial = serial
        self.created = time.monotonic()
        self.closed = False
        self.unwanted = False  # its owner closed it: what is not being read yet need not be
        self.came = 0  # chunks read for it, also after `close`
        self.came_at = self.created  # the last of them, whenever the owner heard of it
        self._store = store
        self._planning = False
        self._targets: deque[_Target] = deque()
        self._coming: set[Key] = set()
        self._held: list[ReadLease] = []

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        return self.closed or not (self._planning or self._targets or self._coming)

    @property
    def moving(self) -> bool:
        """Whether waiting helps: something is on its way, not only due once there is room."""
        return not self.closed and self.reading

    @property
    def reading(self) -> bool:
        """Whether something is on its way, be it for nobody any more."""
        return self._planning or bool(self._coming)

    @property
    def planning(self) -> bool:
        """Whether a tier has not said yet what it holds."""
        return self._planning

    @property
    def remaining(self) -> int:
        """Chunks on their way, or due once there is room."""
        return len(self._targets) + len(self._coming)

    @property
    def arrived(self) -> int:
        """Chunks held for it so far: while this grows, waiting helps."""
        return len(self._held)

    def close(self) -> None:
        """Let go of what was held. What is being read arrives unpinned, what is not yet is left
        where it is unless others wait for it. May be called again.
        """
        self.unwanted = True
        self._let_go()

    def _let_go(self) -> None:
        if not self.closed:
            self.closed = True
            self._store._close_ticket(self)


class TieredStore:
    """Chunks of one rank. `tiers` are the places below RAM, fastest first."""

    def __init__(
        self,
        layout: KVLayout,
        namespace: Namespace,
        ram_bytes: int,
        tiers: Sequence[Tier] = (),
        *,
        stats: Stats | None = None,
        io_threads: int = 4,
        write_queue_bytes: int = 10**9,
        shared: bool = False,
    ) -> None:
        """With `shared`, other processes can map the arena (`Arena.attach`).

        Raises ValueError if `ram_bytes` are too few, or more than there is.
        """
        slot_bytes = Arena.slot_size(layout.chunk_bytes)
        slots = ram_bytes // slot_bytes
        if slots < 2:
            raise ValueError(
                f"LMC_RAM_GB: {ram_bytes / 1e9:.3f} GB for a rank hold fewer than two chunks of "
                f"{slot_bytes / 1e6:.1f} MB; it takes {2 * slot_bytes / 1e9:.3f} GB"
            )
        self.layout, self.namespace = layout, namespace
        self.stats = stats or Stats()
        try:
            self.arena = Arena(slots, layout.chunk_bytes, shared=shared)
        except (OSError, OverflowError) as error:
            raise ValueError(f"LMC_RAM_GB: {ram_bytes / 1e9:.3f} GB for a rank: {error}") from error
        self.ram = RamTier(self.arena, layout.chunk_steps)
        self._done = Completions()
        # queued writes hold RAM: no more than a quarter of it, but room for one chunk
        bound = min(write_queue_bytes, max(1, slots // 4) * slot_bytes)
        self._spill_group_chunks = max(1, min(SPILL_GROUP, bound // slot_bytes))
        self._guards = [Guard(tier, self._done, self.stats, io_threads, bound) for tier in tiers]
        self._fetching: dict[Key, list[Ticket]] = {}
        self._num_fetching = 0  # slots being read into, those of an older namespace included
        self._queue: list[Ticket] = []  # tickets with targets to fetch, in order of arrival
        self._arrivals = itertools.count()
        self._closed = False
        self._tickets: deque[Ticket] = deque()  # all open ones, oldest first
        self._staged: Counter[int] = Counter()  # slots held by tickets
        self._num_warming = 0  # jobs of `warm` under way
        self._max_staged = max(1, slots // 2)

    # --- retrieve

    def stage(self, keys: Sequence[Key]) -> Ticket:
        """A request arrived: make its chain hot everywhere and bring up what RAM lacks. Never
        waits.
        """
        spans = self.ram.find(keys)
        self.ram.touch(spans)
        ticket = Ticket(self, keys, next(self._arrivals))
        if keys:
            self._plan(ticket, 0, sum(span.steps for span in spans))
        self._tickets.append(ticket)
        return ticket

    def stage_any(self, keys: Sequence[Key]) -> Ticket:
        """Bring up the first of `keys`, each a chunk of one step for itself, that is to be had.
        Never waits.
        """
        here = next((i for i, key in enumerate(keys) if key in self.ram), len(keys))
        self.ram.touch(self.ram.find(keys[here : here + 1]))
        ticket = Ticket(self, list(keys[:here]), next(self._arrivals))
        if ticket.keys:
            self._plan_any(ticket, 0, None)
        self._tickets.append(ticket)
        return ticket

    def lookup(self, keys: Sequence[Key], start: int = 0) -> int:
        """Leading steps of `keys` that can be loaded right now."""
        return sum(span.steps for span in self.ram.find(keys, start))

    def settle(self, ticket: Ticket, timeout_s: float) -> bool:
        """Wait for what is on its way to a ticket, at most `timeout_s`; whether it is done."""
        deadline = time.monotonic() + timeout_s
        while ticket.moving and (left := deadline - time.monotonic()) > 0:
            self.poll(left)
        return ticket.done

    def acquire(self, keys: Sequence[Key], start: int = 0) -> ReadLease:
        """Pin what `lookup` answers for; the lease may be shorter than `keys`, never wrong."""
        spans = self.ram.find(keys, start)
        self.ram.touch(spans)
        return self.ram.pin(spans)

    # --- store

    def reserve(self, chunks: Sequence[Chunk], *, spill: bool = True) -> WriteLease:
        """Slots for the chunks of one chain that RAM lacks, as many as fit; on commit they start
        their way down, unless nobody will ever ask for them there.
        """
        lease = self.ram.reserve(chunks)
        lease.on_commit = self._spill if spill else self._keep
        return lease

    # --- upkeep

    def poll(self, timeout_s: float = 0.0) -> int:
        """Apply finished background work; with a timeout, wait for the first piece of it. Once a
        scheduler step.
        """
        count = self._done.run(timeout_s)
        while self._tickets and time.monotonic() - self._tickets[0].created > TICKET_LIFE_S:
            self._tickets.popleft()._let_go()  # somebody may come for it yet
        return count

    def renew(self) -> None:
        """The weights changed: nothing stored so far is found again, and lasting tiers get nothing
        more from here.
        """
        for ticket in list(self._tickets):
            ticket._targets.clear()
        for ticket in list(self._tickets):
            ticket.close()
        self.namespace = self.namespace.next_generation()
        self._fetching.clear()  # what is on its way arrives for nobody
        self.ram.clear()
        self.stats.add("generations")

    def warm(self) -> None:
        """After a start: bring up what lasting tiers saw used last, into free memory only and no
        more than half of it, behind everybody's back. Never waits, never evicts.
        """
        for guard in self._guards:
            if guard.persistent and self._reaches(guard):
                self._look_for_hottest(guard)

    @property
    def warming(self) -> bool:
        """Whether `warm` goes on, which takes a `poll` now and then."""
        return self._num_warming > 0

    @property
    def num_staged(self) -> int:
        """Slots held by tickets."""
        return len(self._staged)

    def drain(self, timeout_s: float) -> bool:
        """Wait until no tier has anything to do; whether that came about in time."""
        deadline = time.monotonic() + timeout_s
        while (
            any(guard.busy for guard in self._guards) and (left := deadline - time.monotonic()) > 0
        ):
            self.poll(min(left, 0.1))
        return not any(guard.busy for guard in self._guards)

    def snapshot(self) -> dict[str, float]:
        """Counters and gauges."""
        return self.stats.snapshot() | self.gauges()

    def gauges(self) -> dict[str, float]:
        """How full it is right now."""
        return {
            "ram.slots": self.arena.num_slots,
            "ram.free_slots": self.ram.num_free,
            "ram.idle_slots": self.ram.num_idle,
            "ram.evictions": self.ram.evictions,
            "staged_slots": self.num_staged,
            "warming": self._num_warming,
            "spill_queue_bytes": sum(guard.write_bytes for guard in self._guards),
        }

    def close(self, drain_s: float = 30.0) -> None:
        """Let what is queued land, for at most `drain_s`, and give everything back. May be called
        again.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + drain_s
        for ticket in list(self._tickets):
            ticket._targets.clear()
        for ticket in list(self._tickets):
            ticket.close()
        for guard in self._guards:
            guard.close(max(0.0, deadline - time.monotonic()))
        self.arena.close()

    # --- down

    def _keep(self, slots: Sequence[int]) -> None:
        self.stats.add("ram.stored", len(slots))

    def _spill(self, slots: Sequence[int]) -> None:
        self._keep(slots)
        for guard in () if self._closed else self._guards:
            if self._reaches(guard):
                for i in range(0, len(slots), self._spill_group_chunks):
                    self._spill_group(guard, slots[i : i + self._spill_group_chunks])

    def _spill_group(self, guard: Guard, slots: Sequence[int]) -> None:
        lease = self.ram.pin_slots(slots)
        namespace, layout = self.namespace, self.layout
        view, ram = self.arena.view, self.ram
        work = [(slot, ram.joined_keys(slot), ram.parent_key(slot)) for slot in slots]

        def write(tier: Tier) -> int:
            written: list[Name] = []
            for slot, joined, parent in work:
                keys = split_keys(joined)
                names = [namespace.fold(key) for key in keys]
                blob = seal(view(slot), namespace, keys, layout, parent)
                tier.write(names[-1], blob, names[:-1])
                written.append(names[-1])
            # a use of all of them: written from its beginning, a chain is let go from its end
            return tier.probe(written)

        def landed(written: int | None) -> None:
            self.stats.add(f"{guard.name}.written", written or 0)
            lease.release()

        if not guard.write(len(slots) * self.arena.slot_bytes, write, landed):
            lease.release()

    def _reaches(self, guard: Guard) -> bool:
        """A private namespace is unknown to every later process: lasting tiers would only collect
        rubbish.
        """
        return not (self.namespace.private and guard.persistent)

    # --- up

    def _plan(self, ticket: Ticket, tier: int, have: int) -> None:
        """Ask tier number `tier` what it holds beyond the first `have` steps, then the tiers below
        it.
        """
        if tier == len(self._guards):
            return self._enqueue(ticket)
        guard = self._guards[tier]
        if not self._reaches(guard):
            return self._plan(ticket, tier + 1, have)
        keys, layout, namespace = ticket.keys, self.layout, self.namespace

        def planned(found: list[int] | None) -> None:
            ticket._planning = False
            if ticket.closed or namespace is not self.namespace:
                return
            for end in found or ():
                begin = (end - 1) // layout.chunk_steps * layout.chunk_steps
                ticket._targets.append(
                    _Target(keys[end - 1], end, keys[begin - 1] if begin else None, guard)
                )
            self._plan(ticket, tier + 1, max(have, found[-1]) if found else have)

        def work(t: Tier) -> list[int]:
            return _found_below(t, namespace, keys, have, layout.chunk_steps)

        if have == len(keys):  # RAM has all of it: the tier hears of the use, nobody waits for that
            guard.read(work, lambda _: None)
            return self._plan(ticket, tier + 1, have)
        ticket._planning = guard.read(work, planned)
        if not ticket._planning:
            self._plan(ticket, tier + 1, have)
        return None

    def _plan_any(self, ticket: Ticket, tier: int, best: _Target | None) -> None:
        """Ask tier number `tier` for the first of the keys, then the tiers below it for one before
        that.
        """
        if tier == len(self._guards) or not ticket.keys:
            if best is not None:
                ticket._targets.append(best)
            return self._enqueue(ticket)
        guard = self._guards[tier]
        if not self._reaches(guard):
            return self._plan_any(ticket, tier + 1, best)
        keys, namespace = ticket.keys, self.namespace

        def planned(at: int | None) -> None:
            ticket._planning = False
            if ticket.closed or namespace is not self.namespace:
                return
            found = best
            if at is not None and at < len(keys):
                ticket.keys, found = keys[:at], _Target(keys[at], 1, None, guard)
            self._plan_any(ticket, tier + 1, found)

        def work(t: Tier) -> int:
            names = ((i, namespace.fold(key)) for i, key in enumerate(keys))
            return next((i for i, name in names if t.probe([name])), len(keys))

        ticket._planning = guard.read(work, planned)
        if not ticket._planning:
            self._plan_any(ticket, tier + 1, best)
        return None

    def _enqueue(self, ticket: Ticket) -> None:
        if ticket._targets:
            insort(self._queue, ticket, key=lambda queued: queued.serial)
            self._pump()

    def _pump(self) -> None:
        """Start fetching, in order of arrival, while staging holds no more than its half of RAM.

        A ticket that fills that half by itself is cut to what fits; one that has nothing yet waits
        for room.
        """
        while self._queue:
            ticket = self._queue[0]
            while ticket._targets:
                if self._is_full() and self._takes_room(ticket._targets[0]):
                    if not (ticket._held or ticket._coming):
                        return
                    ticket._targets.clear()
                elif not self._fetch(ticket, ticket._targets.popleft()):
                    ticket._targets.clear()
            self._queue.remove(ticket)

    def _is_full(self) -> bool:
        return len(self._staged) + self._num_fetching >= self._max_staged

    def _takes_room(self, target: _Target) -> bool:
        """Whether a chunk is neither on its way nor held for another request already."""
        if target.key in self._fetching:
            return False
        spans = self.ram.find([target.key], target.end - 1)
        return not spans or spans[0].slot not in self._staged

    def _fetch(self, ticket: Ticket, target: _Target) -> bool:
        """Bring one chunk up, or join the request that already does; False if that cannot be."""
        if self._hold(ticket, target):
            return True
        waiting = self._fetching.get(target.key)
        if waiting is None:
            lease = self.ram.reserve([Chunk((target.key,), target.parent)])
            if not lease:  # no room, or an engine is just storing it
                return False
            waiting = []
            if not self._read(target, lease, waiting):
                lease.abort()
                return False
            self._fetching[target.key] = waiting
            self._num_fetching += 1
        elif target.guard.resting():  # it may be the one that hangs
            return False
        waiting.append(ticket)
        ticket._coming.add(target.key)
        return True

    def _hold(self, ticket: Ticket, target: _Target) -> bool:
        """Pin a chunk for a ticket until it is closed; False if RAM does not have it."""
        spans = self.ram.find([target.key], target.end - 1)
        if spans:
            ticket._held.append(self.ram.pin(spans))
            self._staged[spans[0].slot] += 1
        return bool(spans)

    def _look_for_hottest(self, guard: Guard) -> None:
        def found(names: Sequence[Name] | None) -> None:
            self._num_warming -= 1
            self._warm(guard, deque(names or ()))

        self._num_warming += guard.read(lambda tier: tier.hottest(WARM_LOOKS), found)

    def _warm(self, guard: Guard, names: deque[Name]) -> None:
        """Read the next of `names`, a few chunks a job, one job at a time."""
        room = self.ram.num_free - self.arena.num_slots // 2
        batch = [names.popleft() for _ in range(min(WARM_GROUP, room, len(names)))]
        if not batch or self._closed or not self._reaches(guard):
            return
        namespace, layout, view = self.namespace, self.layout, self.arena.view
        # who they are shows when they are read; until then a chunk's name stands for its key
        leases = [self.ram.reserve([Chunk((Key(name),), None)]) for name in batch]
        work = [(name, lease.slots[0]) for name, lease in zip(batch, leases, strict=True) if lease]

        def read(tier: Tier) -> list[Chunk | None]:
            return [_read_named(tier, name, view(s), namespace, layout) for name, s in work]

        def arrived(chunks: list[Chunk | None] | None) -> None:
            self._num_warming -= 1
            held = [lease for lease in leases if lease]
            for lease, chunk in zip(held, chunks or [None] * len(held), strict=True):
                if chunk is None or namespace is not self.namespace:
                    lease.abort()
                else:
                    lease.commit([chunk])
                    self.ram.cool(lease.slots[0])
                    self.stats.add(f"{guard.name}.warmed")
            self._warm(guard, names)

        if guard.read(read, arrived):
            self._num_warming += 1
        else:
            for lease in leases:
                lease.abort()

    def _read(self, target: _Target, lease: WriteLease, waiting: list[Ticket]) -> bool:
        namespace, layout, view = self.namespace, self.layout, self.arena.view(lease.slots[0])
        steps = (target.end - 1) % layout.chunk_steps + 1

        def work(tier: Tier) -> tuple[tuple[Key, ...] | str, float]:
            if waiting and all(ticket.unwanted for ticket in waiting):
                return _UNWANTED, 0.0
            found = _read_verified(tier, view, namespace, layout, target.key, steps)
            return found, time.monotonic()

        def arrived(result: tuple[tuple[Key, ...] | str, float] | None) -> None:
            found, at = result or ("error", 0.0)
            if found == _UNWANTED and not all(ticket.unwanted for ticket in waiting):
                if self._read(target, lease, waiting):  # somebody joined meanwhile
                    return
                found = "error"
            self._num_fetching -= 1
            if isinstance(found, tuple):
                self.stats.add(f"{target.guard.name}.hit")
                lease.commit([Chunk(found, target.parent)])
                for ticket in waiting:
                    ticket.came += 1
                    ticket.came_at = max(ticket.came_at, at)
            else:
                self.stats.add(f"{target.guard.name}.miss.{found}")
                lease.abort()
            self._hand_out(target, waiting)

        return target.guard.read(work, arrived)

    def _hand_out(self, target: _Target, waiting: list[Ticket]) -> None:
        """A chunk came, or did not: pin it for those who wait, or tell them that nothing beyond it
        will help.
        """
        if self._fetching.get(target.key) is waiting:
            del self._fetching[target.key]
        for ticket in waiting:
            ticket._coming.discard(target.key)
            if not ticket.closed and not self._hold(ticket, target):
                ticket._targets.clear()
        self._pump()

    def _close_ticket(self, ticket: Ticket) -> None:
        ticket._targets.clear()
        for lease in ticket._held:
            self._staged[lease.slots[0]] -= 1
            if not self._staged[lease.slots[0]]:
                del self._staged[lease.slots[0]]
            lease.release()
        ticket._held.clear()
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        self._pump()


def _found_below(
    tier: Tier, namespace: Namespace, keys: Sequence[Key], have: int, chunk_steps: int
) -> list[int]:
    """Ends, in steps, of the chunks `tier` holds in an unbroken run from step `have` on; whole
    ones, then one tail.

    The part that RAM holds is probed as well: a tier keeps what is in use.
    """
    first = have // chunk_steps
    names = [
        namespace.fold(keys[i + chunk_steps - 1])
        for i in range(0, len(keys) - chunk_steps + 1, chunk_steps)
    ]
    run = first + tier.probe(names[first:])
    ends = [(i + 1) * chunk_steps for i in range(first, run)]
    begin = run * chunk_steps
    for end in range(min(len(keys), begin + chunk_steps - 1), max(begin, have), -1):
        if tier.probe([namespace.fold(keys[end - 1])]):
            ends.append(end)
            break
    tier.probe(names[:run])  # the beginning was used last
    return ends


def _read_verified(
    tier: Tier, slot: memoryview, namespace: Namespace, layout: KVLayout, key: Key, steps: int
) -> tuple[Key, ...] | str:
    """Read the chunk whose step number `steps` is `key` into `slot`: its step keys, or why it is a
    miss.
    """
    name = namespace.fold(key)
    size = tier.read(name, slot)
    if size == 0:
        return "absent"
    try:
        return verify(slot, size, namespace, key, steps, layout)
    except Damaged as damaged:
        tier.forget(name)  # a newer lmc's own chunks have other names: the version is part of them
        return damaged.cause


def _read_named(
    tier: Tier, name: Name, slot: memoryview, namespace: Namespace, layout: KVLayout
) -> Chunk | None:
    """Read the chunk called `name` into `slot` if it belongs to this namespace and is whole. What
    does not is left where it is: it may be somebody else's, and whoever asks for it checks it.
    """
    frame = slot[:FRAME_BYTES]
    try:
        keys, parent, _ = parse(frame, tier.read(name, frame), namespace, layout)
        if name not in map(namespace.fold, keys):
            return None
        size = tier.read(name, slot)
        keys, parent, payload_sum = parse(slot, size, namespace, layout)
        check_payload(slot, size, len(keys), payload_sum, layout)
    except Damaged:
        return None
    return Chunk(keys, parent)
