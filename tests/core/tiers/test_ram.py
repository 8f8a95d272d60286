"""The RAM tier: states, leases, the order of eviction, and the index inside chunks."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from lmc.keys import KEY_BYTES, Key
from lmc.tiers.arena import Arena
from lmc.tiers.ram import Chunk, RamTier, ReadLease, Span, State, WriteLease
from tests.core.chunks import STEPS, chunks_of, keys_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Ram(RamTier):
    """With what tests say all the time, and every invariant checked at the end."""

    def put(self, keys: Sequence[Key]) -> WriteLease:
        lease = self.reserve(chunks_of(keys))
        lease.commit()
        self.check()
        return lease

    def hit(self, keys: Sequence[Key], start: int = 0) -> int:
        return sum(span.steps for span in self.find(keys, start))

    def hold(self, keys: Sequence[Key], start: int = 0) -> ReadLease:
        spans = self.find(keys, start)
        self.touch(spans)
        lease = self.pin(spans)
        self.check()
        return lease


def make(num_slots: int = 8) -> Ram:
    return Ram(Arena(num_slots, 64), STEPS)


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = make()
    yield ram
    ram.check()


A, B = keys_of("a", 16), keys_of("b", 16)


# --- finding


def test_nothing_is_found_in_an_empty_tier(ram: Ram) -> None:
    assert ram.find(A) == []
    assert ram.find([]) == []
    assert A[0] not in ram
    assert (ram.num_free, ram.num_idle, ram.live_steps()) == (8, 0, 0)


def test_every_leading_run_is_found(ram: Ram) -> None:
    ram.put(A[:10])
    assert ram.num_free == 5
    assert ram.live_steps() == 10
    for n in range(17):
        assert ram.hit(A[:n]) == min(n, 10)


@pytest.mark.parametrize("start", range(11))
def test_finding_from_the_middle(ram: Ram, start: int) -> None:
    ram.put(A[:10])
    spans = ram.find(A[start:], start)
    assert sum(span.steps for span in spans) == 10 - start
    at = start
    for span in spans:
        assert span.first == at % STEPS
        assert span.total == (2 if at >= 8 else STEPS)
        at += span.steps


def test_prompt_that_diverges_in_mid_chunk_hits_what_is_the_same(ram: Ram) -> None:
    ram.put(A[:8])
    for same in range(1, 9):
        fork = keys_of("fork", 12, after=A[:same])
        assert ram.hit(fork) == same


def test_span_says_where_a_part_of_a_chunk_lies(ram: Ram) -> None:
    slot = ram.put(A[:4]).slots[0]
    assert ram.find(A[1:3], 1) == [Span(slot, 1, 2, 4)]
    assert ram.find([A[2]], 2) == [Span(slot, 2, 1, 4)]


def test_chunk_with_a_gap_before_it_is_no_leading_run(ram: Ram) -> None:
    chunks = chunks_of(A[:12])
    lease = ram.reserve([chunks[0], chunks[2]])
    lease.commit()
    assert ram.hit(A) == 4
    assert ram.hit(A[8:], 8) == 4


def test_chunks_that_share_their_beginning_answer_for_each_other(ram: Ram) -> None:
    one = keys_of("one", 4, after=A[:2])
    two = keys_of("two", 4, after=A[:3])
    for first, second in ((one, two), (two, one)):
        ram.put(first)
        ram.put(second)
        assert ram.hit(A[:4]) == 3
        lease = ram.hold(second)
        lease.release()  # now the first is the coldest
        ram.reserve(chunks_of(keys_of("filler", 28))).abort()
        ram.check()
        assert ram.hit(first) == len({*first} & {*second})
        assert ram.hit(second) == 4
        ram.clear()


def test_the_one_that_answers_for_a_shared_beginning_goes(ram: Ram) -> None:
    one, two = keys_of("one", 4, after=A[:3]), keys_of("two", 4, after=A[:3])
    ram.put(one)
    ram.put(two)
    with ram.hold(one):
        pass
    ram.reserve(chunks_of(keys_of("filler", 28))).abort()
    assert ram.hit(two) == 3
    assert ram.hit(one) == 4
    assert ram.hit(A) == 3


# --- storing


def test_chunk_is_seen_only_after_commit(ram: Ram) -> None:
    lease = ram.reserve(chunks_of(A[:8]))
    assert [chunk.key for chunk in lease.chunks] == [A[3], A[7]]
    assert len(lease) == len(lease.slots) == 2
    assert ram.hit(A) == 0
    assert A[3] not in ram
    ram.check()
    lease.commit()
    assert ram.hit(A) == 8
    assert A[1] in ram


def test_aborted_chunk_leaves_nothing(ram: Ram) -> None:
    ram.reserve(chunks_of(A[:8])).abort()
    assert ram.hit(A) == 0
    assert ram.num_free == 8


def test_only_what_is_lacking_is_reserved(ram: Ram) -> None:
    ram.put(A[:8])
    lease = ram.reserve(chunks_of(A[:14]))
    assert [len(chunk.keys) for chunk in lease.chunks] == [4, 2]
    assert lease.chunks[0].key == A[11]
    twin = ram.reserve(chunks_of(A[:14]))  # somebody else is writing them
    assert len(twin) == 0
    twin.commit()
    lease.commit()
    assert ram.hit(A) == 14


def test_tail_inside_a_chunk_that_is_here_is_not_stored_again(ram: Ram) -> None:
    ram.put(A[:8])
    assert len(ram.reserve(chunks_of(A[:6]))) == 0
    assert ram.num_idle == 2


def test_tail_is_replaced_by_the_longer_chunk(ram: Ram) -> None:
    ram.put(A[:5])
    ram.put(A[:6])
    assert ram.num_idle == 2
    ram.put(A[:8])
    assert ram.num_idle == 2
    assert ram.hit(A) == 8
    assert ram.live_steps() == 8


def test_pinned_tail_keeps_its_bytes_and_goes_with_its_last_reader(ram: Ram) -> None:
    slot = ram.put(A[:2]).slots[0]
    ram.arena.payload(slot)[:4] = b"tail"
    first, second = ram.hold(A[:2]), ram.hold(A[:1])
    ram.put(A[:4])
    assert ram.find(A)[0].slot != slot
    assert bytes(ram.arena.payload(slot)[:4]) == b"tail"
    first.release()
    ram.reserve(chunks_of(keys_of("filler", 64))).abort()  # nobody else may get the slot
    assert bytes(ram.arena.payload(slot)[:4]) == b"tail"
    ram.check()
    second.release()
    assert ram.num_free == 8


def test_longer_chunk_that_came_first_makes_the_tail_needless(ram: Ram) -> None:
    tail = ram.reserve(chunks_of(A[:3]))
    ram.put(A[:4])
    tail.commit()
    ram.check()
    assert (ram.num_idle, ram.num_free) == (1, 7)
    assert ram.hit(A) == 4


def test_what_arrives_may_be_longer_than_what_was_asked_for(ram: Ram) -> None:
    lease = ram.reserve([Chunk((A[1],), None)])
    lease.commit([Chunk(tuple(A[:4]), None)])
    assert ram.hit(A) == 4


def test_needless_chunk_does_not_keep_its_parent_in_use(ram: Ram) -> None:
    ram.put(A[:4])
    tail = ram.reserve(chunks_of(A[:6]))
    ram.put(A[:8])
    tail.commit()
    ram.check()


def test_commit_with_the_wrong_number_of_chunks_is_refused_and_keeps_the_lease(ram: Ram) -> None:
    lease = ram.reserve(chunks_of(A[:8]))
    with pytest.raises(ValueError, match="1 chunks for the 2 slots"):
        lease.commit([Chunk(tuple(A[:4]), None)])
    lease.commit()
    assert ram.hit(A) == 8


def test_commit_tells_of_a_tail_that_a_longer_chunk_covers_by_now(ram: Ram) -> None:
    told: list[list[int]] = []

    def tell(slots: Sequence[int]) -> None:
        told.append(list(slots))
        held.append(ram.pin_slots(slots[1:]))
        assert ram.joined_keys(slots[1]) == b"".join(A[4:7])
        assert ram.parent_key(slots[1]) == A[3]

    held: list[ReadLease] = []
    lease = ram.reserve(chunks_of(A[:7]))
    ram.put(A[:8])  # the second chunk only: the first is being written
    lease.on_commit = tell
    lease.commit()
    assert told == [list(lease.slots)]
    assert ram.hit(A) == 8
    ram.check()
    free = ram.num_free
    held[0].release()
    assert ram.num_free == free + 1
    ram.check()


def test_commit_does_not_tell_of_a_chunk_that_is_here_already(ram: Ram) -> None:
    lease = ram.reserve([Chunk((Key(b"n" * KEY_BYTES),), None)])
    ram.put(A[:4])
    lease.on_commit = lambda _: pytest.fail("what is here went down when it came")
    lease.commit(chunks_of(A[:4]))
    ram.check()


def test_orphans_are_adopted_when_their_parent_comes(ram: Ram) -> None:
    chunks = chunks_of(A[:12])
    ram.reserve([chunks[2]]).commit()
    ram.reserve([chunks[1]]).commit()
    ram.check()
    assert ram.hit(A) == 0
    ram.reserve([chunks[0]]).commit()
    ram.check()
    assert ram.hit(A) == 12
    order = evict_one_by_one(ram, A[:12])
    assert order == [2, 1, 0]


def test_orphan_that_goes_is_not_adopted(ram: Ram) -> None:
    chunks = chunks_of(A[:8])
    ram.reserve([chunks[1]]).commit()
    fork = chunks_of(keys_of("fork", 8, after=A[:4]))
    ram.reserve([fork[1]]).commit()
    with ram.pin(ram.find([fork[1].key], 7)):
        ram.reserve(chunks_of(keys_of("filler", 28))).abort()
    ram.check()
    ram.reserve([chunks[0]]).commit()
    ram.check()
    assert ram.hit([*A[:4], *fork[1].keys]) == 8
    assert ram.hit(A[:8]) == 4


# --- eviction


def evict_one_by_one(ram: Ram, keys: Sequence[Key]) -> list[int]:
    """Numbers of the chunks of `keys` in the order they go."""
    order: list[int] = []
    names = [keys[min(i + STEPS, len(keys)) - 1] for i in range(0, len(keys), STEPS)]
    held = []
    for n in range(ram.arena.num_slots):
        held.append(ram.reserve([Chunk((keys_of("evict", n + 1)[n],), None)]))
        ram.check()
        order += [i for i, name in enumerate(names) if name not in ram and i not in order]
    for lease in held:
        lease.abort()
    return order


def test_chain_is_evicted_from_its_end(ram: Ram) -> None:
    ram.put(A[:14])
    assert evict_one_by_one(ram, A[:14]) == [3, 2, 1, 0]
    assert ram.evictions == 4


def test_chain_is_evicted_from_its_end_in_whatever_order_it_was_released(ram: Ram) -> None:
    ram.put(A)
    leases = [ram.pin(ram.find(A[i : i + 4], i)) for i in range(0, 16, 4)]
    for n in (1, 3, 0, 2):
        leases[n].release()
        ram.check()
    assert evict_one_by_one(ram, A) == [3, 2, 1, 0]


def test_coldest_chain_goes_first(ram: Ram) -> None:
    ram.put(A[:8])
    ram.put(B[:8])
    ram.touch(ram.find(A[:8]))
    assert evict_one_by_one(ram, B[:8]) == [1, 0]
    ram.put(A[:8])
    ram.put(B[:8])
    assert evict_one_by_one(ram, A[:8]) == [1, 0]


def test_touching_the_end_of_a_chain_keeps_its_beginning(ram: Ram) -> None:
    ram.put(A)
    ram.put(B)
    ram.touch(ram.find(A[12:], 12))
    ram.check()
    assert evict_one_by_one(ram, [*B, *A])[:4] == [3, 2, 1, 0]


def test_chunks_for_themselves_are_touched_where_they_are(ram: Ram) -> None:
    cold = keys_of("c", 4)
    for keys in (A[:4], B[:4], cold):
        ram.put(keys)
    ram.touch_each([B[3], keys_of("unknown", 1)[0], A[3]])
    ram.check()
    lease = ram.reserve(chunks_of(keys_of("filler", 4 * (ram.num_free + 2))))
    assert [ram.hit(keys) for keys in (cold, B[:4], A[:4])] == [0, 0, 4]
    lease.abort()


def test_branch_that_is_cold_goes_before_the_shared_beginning(ram: Ram) -> None:
    ram.put(A[:8])
    cold = keys_of("cold", 8, after=A[:4])
    ram.put(cold)
    ram.touch(ram.find(A[:8]))
    lease = ram.reserve(chunks_of(keys_of("filler", 24)))
    assert len(lease) == 6
    assert ram.hit(A[:8]) == 8
    assert ram.hit(cold) == 4
    lease.abort()


def test_pinned_chunks_are_not_evicted(ram: Ram) -> None:
    ram.put(A[:8])
    with ram.hold(A[:8]) as lease:
        taken = ram.reserve(chunks_of(keys_of("filler", 60)))
        assert len(taken) == 6
        assert not {*taken.slots} & {*lease.slots}
        assert ram.hit(A) == 8
        taken.abort()


def test_parent_of_a_pinned_chunk_is_not_evicted(ram: Ram) -> None:
    ram.put(A[:8])
    lease = ram.pin(ram.find(A[4:8], 4))
    taken = ram.reserve(chunks_of(keys_of("filler", 60)))
    assert len(taken) == 6
    assert ram.hit(A) == 8
    taken.abort()
    lease.release()


def test_ram_full_of_pinned_chunks_takes_nothing_and_loses_nothing(ram: Ram) -> None:
    keys = keys_of("full", 32)
    ram.put(keys)
    with ram.hold(keys) as lease:
        assert lease.steps == 32
        assert len(ram.reserve(chunks_of(A))) == 0
        ram.check()
    assert len(ram.put(A)) == 4


def test_chain_is_not_evicted_by_its_own_extension(ram: Ram) -> None:
    ram.put(keys_of("other", 8))
    keys = keys_of("long", 48)
    ram.put(keys[:16])
    lease = ram.reserve(chunks_of(keys))
    assert len(lease) == 4
    assert ram.hit(keys) == 16
    lease.commit()
    ram.check()
    assert ram.hit(keys) == 32
    assert len(ram.reserve(chunks_of(keys))) == 0
    assert ram.hit(keys) == 32


def test_chain_that_is_being_extended_is_not_evicted_by_others(ram: Ram) -> None:
    ram.put(A[:8])
    lease = ram.reserve(chunks_of(A[:12]))
    taken = ram.reserve(chunks_of(keys_of("filler", 60)))
    assert len(taken) == 5
    ram.check()
    taken.abort()
    lease.commit()
    assert ram.hit(A) == 12


def test_chunk_that_comes_after_its_child_was_reserved_is_not_evicted_before_it(ram: Ram) -> None:
    chunks = chunks_of(A[:8])
    child = ram.reserve([chunks[1]])
    ram.reserve([chunks[0]]).commit()
    ram.check()
    taken = ram.reserve(chunks_of(keys_of("filler", 60)))
    assert len(taken) == 6
    child.commit()
    assert ram.hit(A) == 8
    taken.abort()


def test_orphan_that_was_only_reserved_is_forgotten(ram: Ram) -> None:
    chunks = chunks_of(A[:8])
    ram.reserve([chunks[1]]).abort()
    ram.check()
    ram.put(A[:4])
    taken = ram.reserve(chunks_of(keys_of("filler", 60)))
    assert len(taken) == 8
    taken.abort()


def test_chain_can_go_again_after_its_extension_was_aborted(ram: Ram) -> None:
    ram.put(A[:8])
    ram.reserve(chunks_of(A[:12])).abort()
    taken = ram.reserve(chunks_of(keys_of("filler", 60)))
    assert len(taken) == 8
    taken.abort()


def test_prompt_longer_than_ram_keeps_its_beginning(ram: Ram) -> None:
    keys = keys_of("long", 60)
    assert len(ram.put(keys)) == 8
    assert ram.hit(keys) == 32
    assert len(ram.put(keys)) == 0
    assert ram.hit(keys) == 32


def test_one_slot(ram: Ram) -> None:
    tiny = make(1)
    assert len(tiny.put(A)) == 1
    assert tiny.hit(A) == 4
    assert len(tiny.put(A)) == 0
    assert len(tiny.put(B)) == 1
    assert tiny.hit(B) == 4


def test_reservation_finds_the_only_leaf_behind_chains_in_use() -> None:
    ram = make(40)
    docs = [keys_of(n, 12) for n in range(13)]
    for keys in docs:
        ram.put(keys)
    leases = [ram.pin(ram.find(keys[8:], 8)) for keys in docs[:12]]
    for keys in docs[:12]:  # idle, but their ends are in use
        ram.touch(ram.find(keys[:8]))
    ram.touch(ram.find(docs[12]))
    taken = ram.reserve(chunks_of(A))
    assert len(taken) == 4
    ram.check()
    assert all(ram.hit(keys) == 12 for keys in docs[:12])
    taken.abort()
    for lease in leases:
        lease.release()
    ram.check()


def test_reservation_gives_up_after_a_few_dozen_chains_in_use() -> None:
    ram = make(200)
    docs = [keys_of(n, 8) for n in range(100)]
    for keys in docs:
        ram.put(keys)
    leases = [ram.pin(ram.find(keys[4:], 4)) for keys in docs]
    assert len(ram.reserve(chunks_of(A))) == 0
    ram.check()
    for lease in leases:
        lease.release()
    assert len(ram.put(A)) == 4


# --- leases


def test_lease_is_given_back_once(ram: Ram) -> None:
    written = ram.put(A[:4])
    for again in (written.commit, written.abort):
        with pytest.raises(RuntimeError, match="given back twice"):
            again()
    lease = ram.hold(A)
    lease.release()
    with pytest.raises(RuntimeError, match="given back twice"):
        lease.release()
    aborted = ram.reserve(chunks_of(B))
    aborted.abort()
    with pytest.raises(RuntimeError, match="given back twice"):
        aborted.commit()


def test_empty_lease_may_be_given_back_at_will(ram: Ram) -> None:
    lease = ram.hold(A)
    assert (len(lease), lease.steps, lease.spans) == (0, 0, ())
    lease.release()
    lease.release()
    write = ram.reserve([])
    write.abort()
    write.commit()


@pytest.mark.parametrize("kind", ["ReadLease", "WriteLease"])
def test_forgotten_lease_is_a_warning(kind: str) -> None:
    ram = make()
    ram.put(A[:8])
    lease = ram.hold(A) if kind == "ReadLease" else ram.reserve(chunks_of(B[:8]))
    with pytest.warns(ResourceWarning, match=f"{kind} of 2 slots never given back"):
        del lease


def test_lease_as_a_context_is_given_back_whatever_happens(ram: Ram) -> None:
    ram.put(A[:8])
    with pytest.raises(KeyError), ram.hold(A):
        raise KeyError
    assert ram.num_idle == 2


def test_many_readers_of_one_chunk(ram: Ram) -> None:
    ram.put(A[:4])
    leases = [ram.hold(A) for _ in range(5)]
    for lease in leases:
        assert ram.num_idle == 0
        lease.release()
        ram.check()
    assert ram.num_idle == 1


def test_whole_slots_are_held_by_number(ram: Ram) -> None:
    slots = ram.put(A[:6]).slots
    lease = ram.pin_slots(slots)
    assert [(span.slot, span.first, span.steps, span.total) for span in lease.spans] == [
        (slots[0], 0, 4, 4),
        (slots[1], 0, 2, 2),
    ]
    assert ram.joined_keys(slots[1]) == A[4] + A[5]
    lease.release()


# --- weights that change


def test_clear_forgets_everything_idle(ram: Ram) -> None:
    ram.put(A)
    ram.clear()
    assert ram.hit(A) == 0
    assert ram.num_free == 8


def test_clear_leaves_readers_their_bytes(ram: Ram) -> None:
    ram.put(A[:8])
    lease = ram.hold(A)
    for slot in lease.slots:
        ram.arena.payload(slot)[:3] = b"old"
    ram.clear()
    ram.check()
    assert ram.hit(A) == 0
    taken = ram.reserve(chunks_of(keys_of("new", 60)))
    assert len(taken) == 6
    assert all(bytes(ram.arena.payload(slot)[:3]) == b"old" for slot in lease.slots)
    taken.abort()
    lease.release()
    assert ram.num_free == 8


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_what_was_being_written_at_clear_is_never_seen(ram: Ram, end: str) -> None:
    ram.put(A[:4])
    lease = ram.reserve(chunks_of(A[:12]))
    lease.on_commit = lambda _: pytest.fail("what is outdated must not go down")
    ram.clear()
    ram.check()
    getattr(lease, end)()
    ram.check()
    assert ram.hit(A[4:], 4) == 0
    assert ram.num_free == 8


def test_same_chunks_can_be_stored_while_outdated_ones_are_still_being_written(ram: Ram) -> None:
    old = ram.reserve(chunks_of(A[:8]))
    ram.clear()
    new = ram.reserve(chunks_of(A[:8]))
    assert len(new) == 2
    new.commit()
    old.commit()
    ram.check()
    assert {span.slot for span in ram.find(A)} == set(new.slots)
    assert ram.hit(A) == 8


def test_clear_twice_with_everything_open(ram: Ram) -> None:
    ram.put(A[:8])
    reader, writer = ram.hold(A), ram.reserve(chunks_of(B[:8]))
    ram.clear()
    ram.clear()
    ram.put(A[:8])
    ram.check()
    reader.release()
    writer.abort()
    ram.check()
    assert ram.hit(A) == 8


# --- the garbage collector


def test_index_does_not_feed_the_garbage_collector(ram: Ram) -> None:
    ram.put(A[:14])
    ram.reserve(chunks_of(B[:4])).abort()
    for table in (ram._index, ram._keys, ram._parent_key, ram._writing):
        assert not gc.is_tracked(table)
    assert not any(gc.is_tracked(key) for key in ram._index)


# --- the check itself


SPOILS: dict[str, Callable[[Ram], object]] = {
    "free list": lambda ram: ram._free.append(0),
    "reserved slot": lambda ram: ram._writing.update({B[0]: 3}),
    "index": lambda ram: ram._index.pop(A[0]),
    "LRU": lambda ram: ram._lru.popitem(),
    "doomed": lambda ram: ram._state.__setitem__(0, State.DOOMED),
    "pins": lambda ram: ram._pins.__setitem__(3, 1),
    "children": lambda ram: ram._children.__setitem__(0, 5),
    "order": lambda ram: ram._lru.move_to_end(ram.find(A)[0].slot, last=False),
    "orphans": lambda ram: ram._orphans.update({B[0]: {}}),
    "holders": lambda ram: ram._also.update({A[0]: {}}),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_check_sees_what_is_wrong(spoil: str) -> None:
    ram = make(4)
    ram.put(A[:8])
    SPOILS[spoil](ram)
    with pytest.raises(AssertionError):
        ram.check()
