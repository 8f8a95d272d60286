"""What a model keeps of a prefix, pool by pool: how pages of each become chunks, and how far a
prefix goes of which all pools hold what it needs. Owned by the scheduler thread.

    full attention    every page: whole chunks and a tail, each begun where the chunk before ends
    sliding window    the last pages: chunks of a page (of 16 tokens at least), each for itself
    recurrent state   one slot at the prefix's end: a chunk for itself, named as its last page

SGLang counts pages and names each by a chained digest, the same in all pools. A list of digests
here belongs to pages `first`, `first` + 1, ... of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch

from lmc.keys import Key
from lmc.layout import MIN_STEP_TOKENS, KVLayout
from lmc.tiers.arena import Arena
from lmc.tiers.ram import Chunk
from lmc.transfer import Piece, Transfer

from .pools import DevicePool, Kind

if TYPE_CHECKING:
    from lmc.store import Ticket, TieredStore
    from lmc.tiers.ram import ReadLease, Span, WriteLease

STATE_TOKENS = 1024
"""A state weighs as much as it does if prefixes end this far apart: about one a request."""
MAX_LOOKS = 4096
"""Chunks of windows, and ends of prefixes for a state, looked for in RAM."""
MAX_LOOKS_BELOW = 64
"""Ends of prefixes tried for a state in the tiers below RAM, one by one; these are tried at every
_FAR_PAGES pages before that as well.
"""
_FAR_PAGES = 64
_ONE_PAGE = 64
"""A state's chunk is one page; how many tokens are said to be in it means nothing."""

_decode: Callable[[str], Key] = bytes.fromhex  # type: ignore[assignment]


class StepKeys(Sequence[Key]):
    """SGLang's hex digests of consecutive pages as keys of steps: every `stride`-th, decoded when
    looked at.
    """

    def __init__(self, digests: Sequence[str], first: int = 0, stride: int = 1) -> None:
        self._digests, self._at = digests, range(first, len(digests), stride)

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, i: int) -> Key: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Key]: ...
    def __getitem__(self, i: int | slice) -> Key | Sequence[Key]:
        if isinstance(i, slice):
            at = self._at[i]
            chosen = self._digests[at.start : at.stop : at.step]
            return list(map(_decode, chosen))
        return _decode(self._digests[self._at[i]])


def layout_of(pool: DevicePool, page_tokens: int, chunk_tokens: int, *, any_page: bool) -> KVLayout:
    """How a pool's pages are cut into chunks. With `any_page` a prefix may end at every page.
    Raises ValueError for pages and chunks that do not fit each other.
    """
    planes = pool.pages.page_bytes
    if pool.kind is Kind.STATE:
        return KVLayout(_ONE_PAGE, _ONE_PAGE, planes)
    step = page_tokens if any_page else 0
    if pool.kind is Kind.WINDOW:  # SGLang keeps a window to the page: a longer chunk begins before
        chunk = max(page_tokens, MIN_STEP_TOKENS)
        return KVLayout(page_tokens, chunk, planes, step, min_chunk_tokens=chunk)
    if any_page and page_tokens < MIN_STEP_TOKENS:
        chunk_tokens = min(chunk_tokens, _ONE_PAGE)
    return KVLayout(page_tokens, chunk_tokens, planes, step)


def shares_of(
    layouts: Sequence[KVLayout], pools: Sequence[DevicePool], ram_bytes: int
) -> list[int]:
    """Parts of RAM, so that all pools hold about as many tokens. Raises ValueError if they are too
    small to hold anything.
    """
    slots = [Arena.slot_size(layout.chunk_bytes) for layout in layouts]
    costs = [
        slot / (STATE_TOKENS if pool.kind is Kind.STATE else layout.chunk_tokens)
        for slot, layout, pool in zip(slots, layouts, pools, strict=True)
    ]
    shares = [int(ram_bytes * cost / sum(costs)) for cost in costs]
    pairs = list(zip(slots, shares, costs, strict=True))
    if len(pools) > 1 and any(share < 2 * slot for slot, share, _ in pairs):
        enough = max(2 * slot * sum(costs) / cost for slot, _, cost in pairs)
        raise ValueError(
            f"LMC_RAM_GB: {ram_bytes / 1e9:.3f} GB for a rank hold fewer than two chunks of each "
            f"of {len(pools)} pools; it takes {enough / 1e9:.3f} GB"
        )
    return shares


class Move(NamedTuple):
    """Pages of one request and where in RAM they are."""

    lane: Lane
    page_ids: torch.Tensor
    pieces: list[Piece]


class Lane:
    """One pool, its chunks and the store that holds them."""

    def __init__(
        self,
        pool: DevicePool,
        layout: KVLayout,
        store: TieredStore,
        unit_pages: int,
        *,
        writes: bool = True,
    ) -> None:
        """A prefix ends at multiples of `unit_pages` pages. Without `writes` another rank keeps
        the same chunks below RAM for all.
        """
        self.pool, self.layout, self.store = pool, layout, store
        self.writes = writes
        self.kind = pool.kind
        self._unit = unit_pages

    # --- names

    def steps(self, digests: Sequence[str], first: int) -> tuple[int, StepKeys]:
        """Absolute step of the first key, and keys of the steps that end in these pages."""
        per_step = self.layout.step_pages
        step = first // per_step
        return step, StepKeys(digests, (step + 1) * per_step - 1 - first, per_step)

    def _part(self, digests: Sequence[str], first: int, end: int) -> tuple[int, Sequence[Key]]:
        """What a prefix that ends before page `end` needs of this pool beyond page `first`:
        absolute step and keys.
        """
        if self.kind is Kind.STATE:
            return 0, [_decode(digests[end - 1 - first])]
        begin = max(first, end - self.pool.window_pages) if self.kind is Kind.WINDOW else first
        return self.steps(digests[begin - first : end - first], begin)

    # --- how far a prefix goes

    def acquire(self, digests: Sequence[str], first: int, end: int) -> ReadLease:
        """Hold what a prefix that ends before page `end` needs, as far as it is here."""
        start, keys = self._part(digests, first, end)
        return self.store.acquire(keys, start)

    def limit(self, digests: Sequence[str], first: int, end: int) -> int:
        """The longest prefix up to page `end` that is not ruled out by what is missing here: `end`
        if nothing is.
        """
        if self.kind is Kind.STATE:
            ram = self.store.ram
            for at in self._ends(first, end, MAX_LOOKS):
                if _decode(digests[at - 1 - first]) in ram:
                    return at
            return first
        start, keys = self._part(digests, first, end)
        steps = self.store.lookup(keys, start)
        return end if steps == len(keys) else min(end - 1, (start + steps) * self.layout.step_pages)

    def _ends(self, first: int, end: int, most: int) -> range:
        """Where a prefix may end after page `first` and not after `end`, the last one first."""
        last = end // self._unit * self._unit
        return range(last, max(first, last - most * self._unit), -self._unit)

    def stage(self, digests: Sequence[str], end: int) -> Ticket:
        """Bring up what a prefix of `end` pages needs beside full attention, as far as it is known
        below; a state at the last end before that which has one.
        """
        if self.kind is Kind.STATE:
            near = self._ends(0, end, MAX_LOOKS_BELOW)
            ends = [*near, *range(near[-1] // _FAR_PAGES * _FAR_PAGES, 0, -_FAR_PAGES)]
            return self.store.stage_any([_decode(digests[at - 1]) for at in ends])
        begin = max(0, end - self.pool.window_pages)
        begin -= begin % self.layout.chunk_pages
        return self.store.stage(self.steps(digests[begin:end], begin)[1])

    def touch(self, digests: Sequence[str]) -> None:
        """A sequence is in use, its windows and states on the way to its end too, the last
        MAX_LOOKS of them. Full attention needs no such word: `stage` says it.
        """
        whole = self.layout.chunk_pages
        ends = digests[whole - 1 :: whole] if self.kind is Kind.WINDOW else digests
        self.store.ram.touch_each(map(_decode, ends[-MAX_LOOKS:]))

    # --- from chunks to pages

    def load(self, lease: ReadLease, end: int, slots: torch.Tensor) -> Move | None:
        """How what a lease holds of a prefix that ends before page `end` comes into `slots`; None
        where these are not as many as that.
        """
        if self.kind is Kind.STATE:
            page_ids = slots.to("cpu", torch.int64)
            pieces = [Piece(self.store.arena.address(s), 1, 0, 1) for s in lease.slots]
        else:
            page = self.layout.page_tokens
            page_ids = (slots[::page] // page).to("cpu", torch.int64)
            pieces = list(self._pieces(lease.spans, end - len(page_ids), end))
        if sum(piece.pages for piece in pieces) != len(page_ids):
            return None
        return Move(self, page_ids, pieces)

    def _pieces(self, spans: Sequence[Span], first: int, end: int) -> Iterator[Piece]:
        """Where in RAM pages `first` to `end` lie, the first of which is in the first span."""
        per_step, chunk = self.layout.step_pages, self.layout.chunk_pages
        at = first
        for span in spans:
            begin = at - at % chunk
            stop = min(end, begin + (span.first + span.steps) * per_step)
            if stop > at:
                yield Piece(
                    self.store.arena.address(span.slot),
                    span.total * per_step,
                    at - begin,
                    stop - at,
                )
            at = max(at, stop)
            if at == end:
                return

    # --- from pages to chunks

    def chunks(self, digests: Sequence[str], first: int) -> tuple[int, list[Chunk]]:
        """The page at which the first chunk of these pages begins, and all of them. With full
        attention the page before it names its parent.
        """
        if self.kind is Kind.STATE:
            return first, [Chunk((_decode(digests[-1]),), None)]
        begin = -(-first // self.layout.chunk_pages) * self.layout.chunk_pages
        parent = None
        if self.kind is Kind.FULL and begin > first:
            parent = _decode(digests[begin - first - 1])
        keys = self.steps(digests[begin - first :], begin)[1][:]
        chunks: list[Chunk] = []
        for i in range(0, len(keys), self.layout.chunk_steps):
            chunks.append(Chunk(tuple(keys[i : i + self.layout.chunk_steps]), parent))
            parent = chunks[-1].key if self.kind is Kind.FULL else None
        return begin, chunks

    def save(self, slots: torch.Tensor, chunks: Sequence[Chunk], lease: WriteLease) -> Transfer:
        """Gather the chunks of a lease; `slots` begin with the first chunk."""
        address = self.store.arena.address
        if self.kind is Kind.STATE:
            pieces = [Piece(address(lease.slots[0]), 1, 0, 1)]
            return Transfer(self.pool.pages, slots.to("cpu", torch.int64)[-1:], pieces)
        layout = self.layout
        page_ids = (slots[:: layout.page_tokens] // layout.page_tokens).to("cpu", torch.int64)
        sizes = [len(chunk.keys) * layout.step_pages for chunk in lease.chunks]
        if len(lease) < len(chunks):
            number = {id(chunk): n for n, chunk in enumerate(chunks)}
            begins = [number[id(chunk)] * layout.chunk_pages for chunk in lease.chunks]
            ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
            page_ids = torch.cat([page_ids[b:e] for b, e in zip(begins, ends, strict=True)])
        slots_and_sizes = zip(lease.slots, sizes, strict=True)
        pieces = [Piece(address(s), n, 0, n) for s, n in slots_and_sizes]
        return Transfer(self.pool.pages, page_ids[: sum(sizes)], pieces)

    def covers(self, chunks: Sequence[Chunk], lease: WriteLease) -> bool:
        """Whether what the lease does not hold is in RAM already."""
        taken = set(map(id, lease.chunks))
        return all(id(chunk) in taken or chunk.key in self.store.ram for chunk in chunks)
