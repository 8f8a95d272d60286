"""The RAM tier: which chunk sits in which slot, who holds it, what may go. Owned by one thread;
nothing here locks.

    free -> writing (a WriteLease) -> idle (in the LRU) <-> pinned (ReadLeases)
                  |                        |                    |
                  '--- abort ---> free <--- evicted       doomed: replaced or outdated while
                                                          held, unseen, free when released

Only idle slots are evicted, coldest first, and never one whose child is here or being written. An
idle slot is always colder than its parent, so the coldest one is a leaf unless its children are in
use. A chunk is seen only after its lease commits. The index knows every step inside a chunk, so a
sequence that diverges or ends in mid-chunk still hits. State lives in arrays by slot and a dict
from key to slot: nothing here feeds the garbage collector.
"""

from __future__ import annotations

import warnings
from array import array
from collections import OrderedDict
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from ..keys import KEY_BYTES, Key, split_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .arena import Arena

NOBODY = -1
_MAX_LOOKS = 64


class State(IntEnum):
    FREE, WRITING, READY, DOOMED = range(4)


class Chunk(NamedTuple):
    """What a chunk or tail holds: the keys of its steps from the chunk's beginning, and where it
    belongs.

    The last key names it. `parent` is the key of the whole chunk before, None at the start of a
    sequence.
    """

    keys: tuple[Key, ...]
    parent: Key | None

    @property
    def key(self) -> Key:
        return self.keys[-1]


class Span(NamedTuple):
    """A run of steps inside one slot: `steps` of them from `first`, of `total` that the slot
    holds.
    """

    slot: int
    first: int
    steps: int
    total: int


class _Lease:
    """Slots in use. Given back exactly once; one that is forgotten is a ResourceWarning."""

    def __init__(self, ram: RamTier, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self._ram = ram
        self._held = bool(slots)

    def __len__(self) -> int:
        return len(self.slots)

    def _give_back(self) -> None:
        if self.slots and not self._held:
            raise RuntimeError("lease given back twice")
        self._held = False

    def __del__(self) -> None:
        if self._held:
            warnings.warn(
                f"{type(self).__name__} of {len(self)} slots never given back",
                ResourceWarning,
                stacklevel=1,
            )


class ReadLease(_Lease):
    """Chunks that stay where they are and as they are until `release`."""

    def __init__(self, ram: RamTier, spans: Sequence[Span]) -> None:
        super().__init__(ram, [span.slot for span in spans])
        self.spans = tuple(spans)

    @property
    def steps(self) -> int:
        return sum(span.steps for span in self.spans)

    def release(self) -> None:
        self._give_back()
        self._ram._unpin(self.slots)

    def __enter__(self) -> ReadLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class WriteLease(_Lease):
    """Slots only the holder can see. `commit` publishes them, `abort` forgets them."""

    def __init__(self, ram: RamTier, chunks: Sequence[Chunk], slots: Sequence[int]) -> None:
        super().__init__(ram, slots)
        self.chunks = tuple(chunks)
        self.on_commit: Callable[[Sequence[int]], None] | None = None
        self._epoch = ram.epoch

    def commit(self, chunks: Sequence[Chunk] | None = None) -> None:
        """Publish every chunk (as `chunks` where what arrived is longer than what was asked
        for).
        """
        shown = self.chunks if chunks is None else chunks
        if len(shown) != len(self.slots):
            raise ValueError(f"{len(shown)} chunks for the {len(self.slots)} slots of this lease")
        self._give_back()
        if self._outdated:
            self._ram._unpin(self.slots)
        else:
            self._ram._publish(shown, self.slots, self.on_commit)

    def abort(self) -> None:
        self._give_back()
        if self._outdated:
            self._ram._unpin(self.slots)
        else:
            self._ram._forget(self.slots)

    @property
    def _outdated(self) -> bool:
        """Whether `clear` came in between: nobody may see these slots any more."""
        return self._epoch != self._ram.epoch


class RamTier:
    """The index over an arena whose slots hold chunks of up to `chunk_steps` steps."""

    def __init__(self, arena: Arena, chunk_steps: int) -> None:
        n = arena.num_slots
        self.arena = arena
        self.epoch = 0
        self.evictions = 0
        self._chunk_steps = chunk_steps
        self._free = list(range(n - 1, -1, -1))
        self._index: dict[Key, int] = {}  # every step of every ready chunk
        # further holders of a step: chunks that share their first steps and then diverge
        self._also: dict[Key, dict[int, None]] = {}
        self._writing: dict[Key, int] = {}  # chunks reserved, by their own key
        # ready and reserved chunks whose parent is not here, by the parent's key
        self._orphans: dict[Key, dict[int, None]] = {}
        self._lru: OrderedDict[int, None] = OrderedDict()  # idle slots, coldest first
        self._state = bytearray(n)
        self._pins = array("q", bytes(8 * n))
        self._parent = array("q", [NOBODY]) * n
        self._children = array("q", bytes(8 * n))  # ready ones and those being written
        # by slot; dicts of plain values, unlike lists, are nothing to the garbage collector
        self._keys: dict[int, bytes] = {}  # a chunk's step keys, joined
        self._parent_key: dict[int, Key] = {}  # none at the start of a sequence

    # --- finding

    def find(self, keys: Sequence[Key], start: int = 0) -> list[Span]:
        """Spans that hold the leading run of `keys`, which are the steps from absolute step `start`
        on.
        """
        spans: list[Span] = []
        index, whole = self._index, self._chunk_steps
        at, end = start, start + len(keys)
        while at < end:
            stop = at - at % whole + whole
            slot = index.get(keys[stop - 1 - start]) if stop <= end else None
            if slot is None:  # no whole chunk: the longest run of steps that begins one
                for last in range(min(stop - 1, end), at, -1):
                    slot = index.get(keys[last - 1 - start])
                    if slot is not None:
                        spans.append(self._span(slot, at, last))
                        break
                break
            spans.append(self._span(slot, at, stop))
            at = stop
        return spans

    def __contains__(self, key: Key) -> bool:
        """Whether a ready chunk holds the step that `key` names."""
        return key in self._index

    def parent_key(self, slot: int) -> Key | None:
        """The key of the chunk before the one in `slot`."""
        return self._parent_key.get(slot)

    def joined_keys(self, slot: int) -> bytes:
        """The step keys of the chunk in `slot`, joined."""
        return self._keys[slot]

    def touch(self, spans: Sequence[Span]) -> None:
        """Make a chain the hottest, its beginning hottest of all."""
        self._heat([span.slot for span in spans])

    def touch_each(self, keys: Iterable[Key]) -> None:
        """Make chunks that stand for themselves the hottest, the last one hottest of all."""
        index, lru = self._index, self._lru
        for key in keys:
            slot = index.get(key, NOBODY)
            if slot in lru:
                lru.move_to_end(slot)

    def cool(self, slot: int) -> None:
        """Make a chunk that nobody asked for the coldest, if nothing here builds on it: it goes
        before whatever was used.
        """
        if slot in self._lru and not self._children[slot]:
            self._lru.move_to_end(slot, last=False)

    def pin(self, spans: Sequence[Span]) -> ReadLease:
        """Hold what `find` just answered."""
        for span in spans:
            self._pins[span.slot] += 1
            self._lru.pop(span.slot, None)
        return ReadLease(self, spans)

    def pin_slots(self, slots: Sequence[int]) -> ReadLease:
        """Hold whole slots."""
        return self.pin(
            [Span(slot, 0, n, n) for slot in slots for n in [len(self._keys[slot]) // KEY_BYTES]]
        )

    # --- storing

    def reserve(self, chunks: Sequence[Chunk]) -> WriteLease:
        """Slots for the chunks of one chain that RAM lacks, as many as fit, from the first on.
        Never waits. The chain that is being extended stays while it is.
        """
        taken: list[Chunk] = []
        slots: list[int] = []
        index, writing = self._index, self._writing
        for chunk in chunks:
            key = chunk.keys[-1]
            if key in index or key in writing:
                continue
            slot = self._take(chunk.parent)
            if slot is None:
                break
            self._link(slot, chunk.parent)
            self._state[slot] = State.WRITING
            self._keys[slot] = key
            writing[key] = slot
            taken.append(chunk)
            slots.append(slot)
        return WriteLease(self, taken, slots)

    def clear(self) -> None:
        """Forget everything: nothing stored so far is found again, and what is being written will
        not be.
        """
        self.epoch += 1
        for slot in self._writing.values():  # their leases hold them until they notice
            self._pins[slot] = 1
        for slot in {*self._index.values(), *self._writing.values()}:
            self._parent[slot], self._children[slot] = NOBODY, 0
            self._leave(slot)
        for table in (self._index, self._also, self._writing, self._orphans, self._lru):
            table.clear()
        self._parent_key.clear()

    # --- accounting

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._lru)

    def live_steps(self) -> int:
        """Steps held by ready chunks."""
        return sum(len(self._keys[slot]) // KEY_BYTES for slot in set(self._index.values()))

    def check(self) -> None:
        """Assert every invariant above. For tests and idle moments."""
        by_state: dict[int, list[int]] = {state: [] for state in State}
        for slot, state in enumerate(self._state):
            by_state[state].append(slot)
        assert sorted(self._free) == by_state[State.FREE], "the free list is not the free slots"
        assert sorted(self._writing.values()) == by_state[State.WRITING], "a reserved slot was lost"
        assert set(self._index.values()) == set(by_state[State.READY]), (
            "ready slots and index differ"
        )
        idle = {slot for slot in by_state[State.READY] if not self._pins[slot]}
        assert idle == set(self._lru), "the LRU is not the ready, unpinned slots"
        assert all(self._pins[slot] > 0 for slot in by_state[State.DOOMED]), (
            "a doomed slot nobody holds"
        )
        assert not any(self._pins[slot] for slot in by_state[State.FREE] + by_state[State.WRITING])
        children = [0] * self.arena.num_slots
        for slot in by_state[State.READY] + by_state[State.WRITING]:
            if (parent := self._parent[slot]) != NOBODY:
                children[parent] += 1
                assert self._state[parent] == State.READY, "a parent went before its child"
        assert children == list(self._children), "children miscounted"
        self._check_index(by_state[State.READY])
        self._check_order()

    def _check_index(self, ready: Sequence[int]) -> None:
        holders: dict[Key, set[int]] = {}
        for slot in ready:
            for key in split_keys(self._keys[slot]):
                holders.setdefault(key, set()).add(slot)
        also = {key: {self._index[key], *more} for key, more in self._also.items()}
        assert all(len(slots) > 1 for slots in also.values()), "a step lists one holder twice"
        single = {key: {slot} for key, slot in self._index.items()}
        assert single | also == holders, "a step of a ready chunk is not found, or a stale one is"
        for key, orphans in self._orphans.items():
            assert key not in self._index, "an orphan whose parent is here"
            assert orphans, "an empty list of orphans"
            for slot in orphans:
                assert self._state[slot] in (State.READY, State.WRITING), "an orphan that is gone"
                assert self._parent_key[slot] == key, "an orphan of another parent"

    def _check_order(self) -> None:
        age = {slot: n for n, slot in enumerate(self._lru)}
        for slot in age:
            above = self._parent[slot]
            while above != NOBODY:
                assert above not in age or age[above] > age[slot], "a parent colder than its child"
                above = self._parent[above]

    # --- inside

    def _span(self, slot: int, at: int, stop: int) -> Span:
        first = at % self._chunk_steps
        return Span(slot, first, stop - at, len(self._keys[slot]) // KEY_BYTES)

    def _take(self, parent: Key | None) -> int | None:
        """A free slot, evicting the coldest leaf if need be, but not the parent it is for.

        Looks at no more than a few dozen chains, so a reservation stays cheap however much of RAM
        is held.
        """
        if self._free:
            return self._free.pop()
        first, keep = NOBODY, NOBODY if parent is None else self._index.get(parent, NOBODY)
        for _ in range(_MAX_LOOKS):
            slot = next(iter(self._lru), NOBODY)
            if slot in (NOBODY, first):
                return None
            if not self._children[slot] and slot != keep:
                self.evictions += 1
                self._drop(slot)
                return self._free.pop()
            self._heat([slot])  # its children are pinned or being written: in use, and so is it
            first = slot if first == NOBODY else first
        return None

    def _publish(
        self,
        chunks: Sequence[Chunk],
        slots: Sequence[int],
        tell: Callable[[Sequence[int]], None] | None,
    ) -> None:
        """Show reserved slots and `tell` of them. A tail that a longer chunk has come to cover is
        told of as well, since below RAM it has a name of its own; then it goes.
        """
        shown: list[int] = []
        covered: list[int] = []
        new: list[int] = []
        for chunk, slot in zip(chunks, slots, strict=True):
            holder = self._index.get(chunk.key)
            if holder is not None and self._keys[holder].endswith(chunk.key):  # the very same
                self._forget([slot])
                continue
            new.append(slot)
            del self._writing[Key(self._keys[slot])]
            if chunk.parent != self._parent_key.get(slot):  # it was reserved unknown
                self._unlink(slot)
                self._link(slot, chunk.parent)
            if holder is None:
                self._insert(chunk, slot)
                shown.append(slot)
            else:
                self._keys[slot] = b"".join(chunk.keys)
                self._state[slot], self._pins[slot] = State.DOOMED, 1
                covered.append(slot)
        self._heat(shown)
        if new and tell is not None:
            tell(new)
        for slot in covered:
            self._unlink(slot)
        self._unpin(covered)

    def _insert(self, chunk: Chunk, slot: int) -> None:
        index, joined = self._index, b"".join(chunk.keys)
        if not index.keys().isdisjoint(chunk.keys):
            self._meet(chunk, joined)
        index.update(dict.fromkeys(chunk.keys, slot))
        self._state[slot] = State.READY
        self._keys[slot] = joined
        self._lru[slot] = None
        for child in self._orphans.pop(chunk.key, ()):
            self._parent[child] = slot
            self._children[slot] += 1

    def _meet(self, chunk: Chunk, joined: bytes) -> None:
        """A chunk comes whose first steps are here: tails that it holds go, others stay beside."""
        index = self._index
        for old in {index[key] for key in chunk.keys if key in index}:
            if joined.startswith(self._keys[old]):
                self._drop(old)
        for key in chunk.keys:
            if (old := index.get(key, NOBODY)) != NOBODY:
                self._also.setdefault(key, {})[old] = None

    def _link(self, slot: int, parent_key: Key | None) -> None:
        """Make a chunk the child of its parent, or an orphan that waits for it."""
        if parent_key is not None:
            self._parent_key[slot] = parent_key
            parent = self._parent[slot] = self._index.get(parent_key, NOBODY)
            if parent != NOBODY:
                self._children[parent] += 1
            else:
                self._orphans.setdefault(parent_key, {})[slot] = None

    def _unlink(self, slot: int) -> None:
        parent, parent_key = self._parent[slot], self._parent_key.pop(slot, None)
        if parent != NOBODY:
            self._children[parent] -= 1
        elif parent_key is not None:
            orphans = self._orphans[parent_key]
            del orphans[slot]
            if not orphans:
                del self._orphans[parent_key]
        self._parent[slot] = NOBODY

    def _heat(self, slots: Sequence[int]) -> None:
        """Make idle slots of one chain, and all that lies before them, the hottest: the last one
        first, so that the beginning of the chain goes last.
        """
        lru, parents = self._lru, self._parent
        for i in range(len(slots) - 1, -1, -1):
            if slots[i] in lru:
                lru.move_to_end(slots[i])
            above = parents[slots[i]]
            if i and slots[i - 1] == above:
                continue
            while above != NOBODY:
                if above in lru:
                    lru.move_to_end(above)
                above = parents[above]

    def _drop(self, slot: int) -> None:
        """Take a ready leaf out of the index; its memory goes now, or when its last reader has
        left.
        """
        index, also = self._index, self._also
        for key in split_keys(self._keys[slot]):
            if key in also:
                self._hand_on(key, slot)
            else:
                del index[key]
        self._unlink(slot)
        self._lru.pop(slot, None)
        self._leave(slot)

    def _hand_on(self, key: Key, slot: int) -> None:
        """`slot` no longer answers for `key`: another chunk with the same beginning does."""
        others = self._also[key]
        if self._index[key] == slot:
            self._index[key] = others.popitem()[0]
        else:
            del others[slot]
        if not others:
            del self._also[key]

    def _leave(self, slot: int) -> None:
        if self._pins[slot]:
            self._state[slot] = State.DOOMED
        else:
            self._release(slot)

    def _release(self, slot: int) -> None:
        self._state[slot] = State.FREE
        del self._keys[slot]
        self._free.append(slot)

    def _forget(self, slots: Sequence[int]) -> None:
        """Reserved slots that hold nothing worth showing."""
        for slot in slots:
            del self._writing[Key(self._keys[slot])]
            self._unlink(slot)
            self._release(slot)

    def _unpin(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._pins[slot] -= 1
            if self._pins[slot] == 0:
                if self._state[slot] == State.DOOMED:
                    self._release(slot)
                else:
                    self._lru[slot] = None
        self._heat(slots)
