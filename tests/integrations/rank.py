"""One rank of several, in a process of its own: SGLang's real cache with lmc's linker, and what is
played on it.

Every rank plays the same, with bytes, memory and a disk of its own. After each scheduling pass what
SGLang counts is compared. ranks.py starts the processes and hears what they tell.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.integrations.fixtures import SERVER_ARGS, make_model  # first: what SGLang reads

# isort: split
import msgspec
import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, InitLoadBackParams
from sglang.srt.utils import rank_consensus_checker

import lmc.tiers.guard
import lmc_sglang.linker
from lmc.testing import Fault, FaultyTier
from lmc.tiers import open_tiers
from lmc_sglang.identity import Ranks
from tests.integrations.harness import NOTHING, Harness, Request, tokens

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator, Sequence

DEVICE_TOKENS = 6144
WEIGHTS_STAY = 0.75
"""Part of a play before they change: from then on tiers that outlive the process are off."""
FATES = ("served", "arrived", "matched", "queued", "loading", "waiting")
"""Where a request is aborted, or that it waits a pass for its admission."""


class Wish(NamedTuple):
    """What a client wants, and what becomes of it."""

    ids: array[int]
    salt: str | None = None
    fate: str = "served"


def wishes(source: random.Random) -> Iterator[Wish]:
    """Chats that grow, and prompts that share their beginning and diverge anywhere."""
    chats = [tokens(seed, 600) for seed in range(6)]
    while True:
        n = source.randrange(len(chats))
        if len(chats[n]) > 1500:
            chats[n] = tokens(source.randrange(10**6), 300)
        own = tokens(source.randrange(10**6), source.randrange(1, 300))
        if source.random() < 0.3:
            prompt = chats[n][: source.randrange(1, len(chats[n]) + 1)] + own
        else:
            prompt = chats[n] = chats[n] + own
        fate = source.choices(FATES, weights=[12, 1, 1, 1, 1, 2])[0]
        yield Wish(prompt, source.choice([None, None, None, "tenant"]), fate)


class Own(Harness):
    """A rank whose KV is its own: that of another rank or of other weights is wrong here."""

    part, generation = 0, 0

    def hashes(self, ids: array[int]) -> torch.Tensor:
        return super().hashes(ids) + 31 * self.part + 101 * self.generation


class Admitted(NamedTuple):
    """A request of the batch under way; its path on the device is locked."""

    wish: Wish
    req: Request
    node: int
    lock: Any
    path: torch.Tensor


class Rank:
    """The scheduler's part for several requests a pass."""

    def __init__(
        self, rank: int, folder: Path, *, replicated: bool = False, attn_dp_size: int = 1
    ) -> None:
        """`replicated`: every rank holds the same KV. With `attn_dp_size` groups for attention
        ranks agree inside theirs, and groups have requests of their own.
        """
        everybody = torch.distributed.get_world_size()
        width = everybody // attn_dp_size
        groups = [
            torch.distributed.new_group(list(range(first, first + width)))
            for first in range(0, everybody, width)
        ]
        self.rank, self.group_number = rank, rank // width
        self.group = groups[self.group_number]
        rank_consensus_checker.configure([SimpleNamespace(cpu_group=self.group)])
        self.tiers: list[FaultyTier] = []
        self.waiting: list[tuple[Request, Wish]] = []
        self.host_tokens = 0
        self._due = 0  # tokens that the batch under way will compute
        self._stale = False  # the device holds KV of weights that are no more
        lmc_sglang.linker.open_tiers = self._open_tiers
        lmc_sglang.linker.Ranks = SimpleNamespace(
            of=lambda *args, **more: Ranks.of(*args, **(more | {"replicated": replicated}))
        )
        lmc.tiers.guard.REST_S = 0.2  # so that a tier comes back within a test
        args = msgspec.structs.replace(
            SERVER_ARGS,
            model_path=str(folder / "model"),
            tp_size=everybody,
            attn_dp_size=attn_dp_size,
        )
        self.h = Own(args, size=DEVICE_TOKENS, group=self.group)
        self.h.part = 0 if replicated else rank % width

    def _open_tiers(self, config: Any) -> list[FaultyTier]:
        self.tiers = [FaultyTier(tier) for tier in open_tiers(config)]
        return self.tiers

    # --- one scheduling pass

    def serve(self, *arriving: Wish) -> None:
        """One pass: those who waited come first."""
        h, cache, told = self.h, self.h.cache, []
        arrived = [(h.arrive(wish.ids, cache_salt=wish.salt), wish) for wish in arriving]
        coming, self.waiting = self.waiting + arrived, []
        for req, wish in coming:
            if wish.fate == "arrived":
                self._abort(req)
        h.step()
        batch: list[Admitted] = []
        self._due = 0
        for req, wish in coming:
            if wish.fate != "arrived":
                batch += self._admit(req, wish, told)
        h.linker.layer_done_counter.set_consumer(cache.ready_to_load_host_cache())
        for one in batch:
            if one.wish.fate == "loading":
                self._abort(one.req)
        loads = dict(cache.linker.private_load_indices)
        assert cache.linker.finish_loads() == []
        for one in batch:
            self._finish(one, loads.get(one.req.rid, NOTHING))
        self.compare(told)

    def serve_whole(self, *arriving: Wish) -> None:
        """Passes until nobody waits any more."""
        self.serve(*arriving)
        while self.waiting:
            self.h.linker.nap()
            self.serve()

    def _admit(self, req: Request, wish: Wish, told: list[int]) -> list[Admitted]:
        """Match, and ask for what was promised, unless it goes or waits; `told` is what all ranks
        must be told alike.
        """
        h, cache = self.h, self.h.cache
        if len(wish.ids) % 3 == 0:
            h.match(req)  # by a policy that sorts by length, before the match that counts
        match = h.match(req)
        node, device, host = match.last_device_node, match.device_prefix_len, match.host_hit_length
        waits = h.linker.passes_over(req.rid)
        told += [device, host, waits]
        assert not (self._stale and host), "KV of weights that are no more"
        if wish.fate == "matched":
            self._abort(req)
            return []
        if waits:
            self.waiting.append((req, wish))
            return []
        if wish.fate == "waiting":
            self.waiting.append((req, wish._replace(fate="served")))
            return []
        lock = cache.inc_lock_ref(node).to_dec_params()
        rest = len(h.whole(wish.ids)) - device - host
        if host + rest + self._due > h.alloc.available_size() + cache.evictable_size():
            cache.dec_lock_ref(node, lock)
            self.waiting.append((req, wish))
            return []
        path = cache.path_device_indices(node)[:device] if device else NOTHING
        if host:
            req.last_node = node
            loaded, _ = cache.init_load_back(
                InitLoadBackParams(
                    best_match_node=match.best_match_node, host_hit_length=host, req=req
                )
            )
            told.append(loaded)
            assert loaded == host, "what was promised"
        if wish.fate == "queued":
            slots = cache.linker.private_load_indices.get(req.rid, NOTHING)
            self._abort(req)
            self._free(slots)
            cache.dec_lock_ref(node, lock)
            return []
        self._due += rest
        return [Admitted(wish, req, node, lock, path)]

    def _finish(self, one: Admitted, loaded: torch.Tensor) -> None:
        """The forward is over: what was not computed is what was computed once."""
        h, ids, path = self.h, one.wish.ids, one.path
        if not self._stale:
            h.check(ids, path)
        h.check(ids, loaded, len(path))
        self.host_tokens += len(loaded)
        if one.wish.fate == "loading":
            self._free(loaded)
        else:
            have = len(path) + len(loaded)
            rest = h.alloc_tokens(len(h.whole(ids)) - have)
            h.compute(ids, have, rest)
            slots = torch.cat([path, loaded, rest])
            h.insert(ids, slots, prev=len(path), cache_salt=one.req.cache_salt)
        h.cache.dec_lock_ref(one.node, one.lock)

    def _free(self, slots: torch.Tensor) -> None:
        if len(slots):
            self.h.alloc.free(slots)

    def _abort(self, req: Request) -> None:
        self.h.cache.release_aborted_request(CacheRequestHandle(req.rid, 0))

    # --- between passes

    def flush(self) -> None:
        """SGLang flushes an idle engine only."""
        self.abort_waiting()
        self.h.flush()
        self._stale = False

    def abort_waiting(self) -> None:
        for req, _ in self.waiting:
            self._abort(req)
        self.waiting = []

    def change_weights(self, *, flush: bool) -> None:
        for _ in range(2):  # SGLang begins an update, then makes it
            self.h.linker.weights_changed()
        self.h.generation += 1
        self._stale = True
        if flush:
            self.flush()

    def drain(self) -> None:
        """All ranks have written what they had to."""
        self.h.settle()
        assert self.h.store.drain(30)
        torch.distributed.barrier()

    def compare(self, told: Sequence[int] = ()) -> None:
        """Raise AssertionError unless SGLang counts alike on every rank."""
        h, cache, calls = self.h, self.h.cache, self.h.store.snapshot()
        own = torch.zeros(64, dtype=torch.int64)
        counts = [
            len(cache.linker.pending_offloads),
            len(cache.linker.hit_markers),
            len(cache.linker.inflight_load_rids),
            h.alloc.available_size(),
            cache.evictable_size(),
            cache.protected_size(),
            *(int(calls.get(f"scheduler.{verb}.calls", 0)) for verb in ("offload", "load")),
            *told,
        ]
        own[: len(counts)] = torch.tensor(counts)
        found = [own.clone() for _ in range(self.group.size())]
        torch.distributed.all_gather(found, own, group=self.group)
        for rank, theirs in enumerate(found):
            assert torch.equal(theirs, own), f"rank {rank}: {theirs.tolist()}, here {own.tolist()}"

    def close(self) -> dict[str, Any]:
        """Nothing is lost or held; what there is to tell."""
        self.abort_waiting()
        self.h.settle()
        self.h.evict(2 * DEVICE_TOKENS)
        assert self.h.alloc.available_size() == DEVICE_TOKENS, "pages of the device were lost"
        self.compare()
        for tier in self.tiers:
            tier.heal()
        self.h.close()
        self.h.store.ram.check()
        assert not any(self.h.store.ram._pins), "chunks still held"
        return {"stats": self.h.store.snapshot(), "host_tokens": self.host_tokens}


# --- what is played


def requests(rank: Rank, *, seed: int, passes: int, disks: Sequence[str]) -> None:
    """Passes of up to three requests, among evictions, flushes and, in the end, new weights."""
    source, own = random.Random(seed), random.Random(1000 * seed + rank.rank)
    coming = wishes(source)
    trouble = DISKS[disks[rank.rank]]
    for n in range(passes):
        for tier in rank.tiers:
            trouble(tier, own, n)
        rank.serve(*(next(coming) for _ in range(source.randrange(1, 4))))
        match source.randrange(20):
            case 0 | 1 | 2:
                rank.flush()
            case 3 | 4 | 5:
                rank.h.evict(source.randrange(DEVICE_TOKENS))
            case 6 if n > WEIGHTS_STAY * passes:
                rank.change_weights(flush=source.random() < 0.5)


def one_writes(rank: Rank, *, num_prompts: int) -> None:
    """Ranks that hold the same KV, one of which writes, and slowly: what has left RAM comes from
    the folder they share.
    """
    _slow(rank.tiers[0], random.Random(), 0)
    prompts = [Wish(tokens(seed, 1000)) for seed in range(num_prompts)]
    for again in (False, True):
        for prompt in prompts:
            rank.serve_whole(prompt)
            rank.drain()
            rank.flush()
        assert rank.host_tokens == 960 * num_prompts * again


def groups_share(rank: Rank, *, num_prompts: int) -> None:
    """What one group for attention wrote comes back in the other, which never saw it."""
    prompts = [Wish(tokens(seed, 1000)) for seed in range(num_prompts)]
    for group in (0, 1):
        if rank.group_number == group:
            for prompt in prompts:
                rank.serve_whole(prompt)
        rank.drain()
    assert rank.host_tokens == 960 * num_prompts * rank.group_number


def less_room(rank: Rank, *, num_tokens: int) -> None:
    """A prompt that only some have room for comes back as far as all have it."""
    prompt = Wish(tokens(1, num_tokens))
    rank.serve_whole(prompt)
    rank.flush()
    rank.serve_whole(prompt)


def stuck(rank: Rank, *, who: int) -> None:
    """One rank never gets through its pass."""
    if rank.rank == who:
        rank.h.linker.num_completed_offloads = threading.Event().wait
    rank.serve(Wish(tokens(1, 100)))


def divided(rank: Rank, *, who: int) -> None:
    """One rank lets what it counts depend on what it has room for."""
    offload = rank.h.linker.offload

    def refuse(transfers: list[Any], session_id: str | None = None) -> bool:
        return bool(rank.h.store.ram.num_free) and offload(transfers, session_id)

    if rank.rank == who:
        rank.h.linker.offload = refuse
    for seed in range(20):
        rank.serve(Wish(tokens(seed, 1000)))


def _slow(tier: FaultyTier, _: random.Random, n: int) -> None:
    if n == 0:
        for verb in ("probe", "read", "write"):
            tier.plan(verb, Fault(delay_s=0.01), times=None)


def _failing(tier: FaultyTier, source: random.Random, _: int) -> None:
    faults = (
        Fault(error=OSError(errno.EIO, "injected")),
        Fault(lose=True),
        Fault(cut=source.randrange(500_000)),
        Fault(flip_bit=source.randrange(4_000_000)),
        Fault(swap=True),
        Fault(delay_s=0.05),
    )
    if source.random() < 0.2:
        verb = source.choice(["probe", "read", "write"])
        tier.plan(verb, source.choice(faults), times=source.randrange(1, 8))


DISKS: dict[str, Callable[[FaultyTier, random.Random, int], None]] = {
    "well": lambda *_: None,
    "slow": _slow,
    "failing": _failing,
}
PLAYS: dict[str, Callable[..., None]] = {
    play.__name__: play for play in (requests, one_writes, groups_share, less_room, stuck, divided)
}


def main(number: int, size: int, folder: Path) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what SGLang prints is no answer
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=size
    )
    if number == 0:
        (folder / "model").mkdir()
        make_model(folder / "model", b"weights")
    torch.distributed.barrier()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        faulthandler.dump_traceback_later(order["limit_s"], exit=True)
        for name in [name for name in os.environ if name.startswith("LMC_")]:
            del os.environ[name]
        os.environ.update(order["settings"])
        rank = Rank(number, folder, **order["ranks"])
        PLAYS[order["play"]](rank, **order["arguments"])
        told = rank.close()
        rank_consensus_checker.shutdown()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
