"""Pages of a host pool in lmc's tiers, for several threads at once. A page is a chunk of its own:
HiCache does not say where in its sequence a page stands, and a page's digest covers all before it.

The store is owned by whoever holds the lock. Nobody waits for a tier or copies while holding it:
what a copy reads is pinned, and what it writes is seen by nobody yet. What was said to be there
stays pinned, or is on its way up, until it is loaded, or for a while.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmc.tiers.ram import Chunk
from lmc.transfer import Piece, gather, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lmc.keys import Key
    from lmc.store import Ticket, TieredStore
    from lmc.tiers.ram import ReadLease
    from lmc.transfer import Backend, PagedPool

PROMISE_S = 10.0
"""Pages that were said to be there stay for that long at most."""
PATIENCE_S = 5.0
"""Longest wait for a tier, however well it gets on: SGLang gives its threads 10 s to end."""
CLOSE_DRAIN_S = 60.0
_LOOK_S = 0.002


@dataclass(frozen=True, slots=True)
class _Promise:
    """Pages that were said to be there: pinned, and on their way up."""

    until: float
    lease: ReadLease
    ticket: Ticket | None

    def end(self) -> None:
        self.lease.release()
        if self.ticket is not None:
            self.ticket.close()


class PageStore:
    """Keys of consecutive pages in, leading runs out."""

    def __init__(
        self, pool: PagedPool, store: TieredStore, backend: Backend, stage_wait_s: float
    ) -> None:
        self._pool, self._store, self._backend = pool, store, backend
        self._stage_wait_s = stage_wait_s
        self._turn = threading.Condition()
        self._copies = 0  # under way
        self._promises: dict[Key, _Promise] = {}  # by their last key, oldest first
        self._stale = False  # the engine holds KV of weights that are no more
        self._closed = False

    def find(self, keys: Sequence[Key], *, firmly: bool) -> int:
        """Leading pages that can be loaded.

        `firmly` is for the scheduler's own thread: after a single short wait, what is in RAM and
        pinned, because a decode server of SGLang's gives up a request whose promised pages do not
        come. Otherwise what lower tiers say they hold counts too, and is on its way up from now on:
        a page that does not come after all is a miss.
        """
        with self._my_turn("hicache.find"):
            if self._closed:
                return 0
            ticket = None
            if (found := self._store.lookup(keys)) < len(keys):
                ticket = asked = self._store.stage(keys)
                self._wait_for(asked, lambda: asked.moving if firmly else asked.planning)
                if self._closed:
                    return 0
                known = 0 if asked.closed else found + asked.arrived + asked.remaining
                found = max(self._store.lookup(keys), known)
                if firmly:
                    asked.close()
            num_held = self._store.num_staged + sum(len(p.lease) for p in self._promises.values())
            lease = self._store.acquire(keys[: max(0, self._store.arena.num_slots // 2 - num_held)])
            if firmly:
                found = len(lease)
            self._promise(keys[:found], _Promise(time.monotonic() + PROMISE_S, lease, ticket))
            return found

    def load(self, keys: Sequence[Key], page_ids: torch.Tensor) -> int:
        """Copy pages into the pool: how many of them, from the first on."""
        with self._my_turn("hicache.load"):
            lease = self._bring_up(keys)
            address = self._store.arena.address
            pieces = [Piece(address(span.slot), 1, 0, 1) for span in lease.spans]
            try:
                with self._unlocked():
                    scatter(self._pool, page_ids[: len(pieces)], pieces, backend=self._backend)
            finally:
                lease.release()
            for key in self._promises.keys() & set(keys):
                self._promises.pop(key).end()
            self._store.stats.add("pages.loaded", len(pieces))
            return len(pieces)

    def keep(self, keys: Sequence[Key], before: Key | None, page_ids: torch.Tensor) -> list[bool]:
        """Copy pages of one chain out of the pool; `before` is the key of the page before them.
        Which of them are kept now, those that had been before included.
        """
        with self._my_turn("hicache.keep"):
            if self._closed or self._stale:
                self._store.stats.add("pages.refused", len(keys))
                return [False] * len(keys)
            parents = [before, *keys[:-1]]
            lease = self._store.reserve(
                [Chunk((k,), p) for k, p in zip(keys, parents, strict=True)]
            )
            number = {key: n for n, key in enumerate(keys)}
            chosen = page_ids[[number[chunk.key] for chunk in lease.chunks]]
            pieces = [Piece(self._store.arena.address(slot), 1, 0, 1) for slot in lease.slots]
            with ExitStack() as undo:
                undo.callback(lease.abort)
                with self._unlocked():
                    gather(self._pool, chosen, pieces, backend=self._backend)
                undo.pop_all()
            lease.commit()
            return [key in self._store.ram for key in keys]

    def renew(self) -> None:
        """The weights changed: nothing is found again, and what the engine still holds is not kept
        until it was flushed.
        """
        with self._turn:
            self._stale = True
            self.forget()

    def flushed(self) -> None:
        with self._turn:
            self._stale = False

    def forget(self) -> None:
        """Nothing stored so far is found again."""
        with self._turn:
            if not self._closed:
                self._break_promises()
                self._store.renew()

    def snapshot(self) -> dict[str, float]:
        with self._my_turn("hicache.snapshot"):
            return self._store.snapshot()

    def close(self) -> None:
        """Let what is queued land and give everything back. May be called again."""
        with self._turn:
            self._closed = True
            self._turn.wait_for(lambda: not self._copies)
            self._break_promises()
            self._store.close(CLOSE_DRAIN_S)

    # --- inside, all under the lock

    @contextmanager
    def _my_turn(self, name: str) -> Iterator[None]:
        """The lock, and the upkeep that falls to whoever comes by."""
        with self._turn:
            if not self._closed:
                self._store.poll()
            now = time.monotonic()
            while self._promises:
                key, promise = next(iter(self._promises.items()))
                if now < promise.until:
                    break
                del self._promises[key]
                promise.end()
            with self._store.stats.timed(name):
                yield

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Others take their turns while this thread copies."""
        self._copies += 1
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self._copies -= 1
            self._turn.notify_all()

    def _bring_up(self, keys: Sequence[Key]) -> ReadLease:
        """Pin what RAM has, after what is below had its time to come."""
        if self._closed:
            return self._store.ram.pin(())
        if self._store.lookup(keys) == len(keys):
            return self._store.acquire(keys)
        ticket = self._store.stage(keys)
        self._wait_for(ticket, lambda: not ticket.done, patient=True)
        lease = self._store.ram.pin(()) if self._closed else self._store.acquire(keys)
        ticket.close()
        return lease

    def _wait_for(
        self, ticket: Ticket, waiting: Callable[[], bool], *, patient: bool = False
    ) -> None:
        """For no longer than a wait, or as long as something arrives; others take their turns
        meanwhile.
        """
        started = time.monotonic()
        wait_s = min(self._stage_wait_s, PATIENCE_S)
        until, arrived = started + wait_s, 0
        while not self._closed and waiting():
            now = time.monotonic()
            if patient and ticket.arrived > arrived:
                until = min(started + PATIENCE_S, now + wait_s)
                arrived = ticket.arrived
            if now >= until:
                return
            self._turn.wait(_LOOK_S)
            if not self._closed:
                self._store.poll()

    def _promise(self, keys: Sequence[Key], promise: _Promise) -> None:
        if keys:
            if (old := self._promises.pop(keys[-1], None)) is not None:
                old.end()
            self._promises[keys[-1]] = promise
        else:
            promise.end()

    def _break_promises(self) -> None:
        for promise in self._promises.values():
            promise.end()
        self._promises.clear()
