"""The scheduler side: which blocks of which request are kept, and which come back. Owned by the
engine's scheduler thread; it never waits.

    a request arrives       stage: chunks start on their way up
    it is asked for         wait for them a bounded while; then pin the hit and promise it
    blocks are allocated    the load is in this step's work; the pin lasts until all workers did it
    a step is scheduled     chunks it completes are reserved and copied once it has run
    the request finishes    its tail is copied before anything else is written; nothing is held

vLLM's blocks are never held back: a store whose blocks were freed is fenced, so workers finish it
before they write anything else.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmc.stats import Stats
from lmc.store import Ticket, TieredStore
from lmc.tiers import open_tiers
from lmc.tiers.arena import Arena
from lmc.tiers.ram import Chunk, ReadLease, Span, WriteLease

from . import compat
from .adapters import Adapters, folded
from .groups import Group, Kind, unit_tokens
from .identity import namespaces_of
from .wire import Load, Loaded, Move, Place, Registered, Report, Run, Step, Store, machine_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from lmc.config import Config
    from lmc.keys import Key
    from lmc.layout import KVLayout

log = logging.getLogger("lmc")

CLOSE_DRAIN_S = 4.0
"""vLLM kills an engine that takes much longer to go."""
WAIT_FOR_TWIN_S = 2.0
"""Longest wait for a load of the same blocks that another request began."""
SMALL_REST_TOKENS = 32
"""If vLLM's own hit lacks no more, that is computed sooner than loaded, a step or two later."""
WAIT_FOR_ROOM_S = 10.0
"""Longest wait for blocks that loads of other requests leave."""
NEWS_S = 1.0
STATE_BLOCKS = 3
"""Blocks of a recurrent state that vLLM gives a request at once, at most."""
MAX_LOOKS = 256
"""Lengths tried for groups that need the end of a prefix only."""


@dataclass(slots=True)
class _Lane:
    """A group, and the store of its chunks."""

    group: Group
    layout: KVLayout
    store: TieredStore
    hashes_a_step: int


@dataclass(slots=True)
class _Promise:
    """What vLLM was told: tokens `start .. length` are pinned in RAM, for each lane from the first
    one it needs. `computed` of them it had itself when it was told last.
    """

    start: int
    length: int
    leases: list[ReadLease]
    computed: int


@dataclass(slots=True, eq=False)
class _Load:
    """Blocks on their way to the workers."""

    length: int
    leases: list[ReadLease]
    ends: list[Key] = field(default_factory=list)
    landed: bool = False
    void: bool = False  # of weights that are no more


@dataclass(slots=True)
class _Request:
    """One request of vLLM, as long as it lives."""

    request: Any
    mark: bytes | None = b""  # of its adapter, folded into its keys; None: it has no names
    look: Future[bytes | None] | None = None  # at its adapter's files, until that decided the mark
    keys: list[list[Key]] = field(default_factory=list)  # by lane, of as many steps as needed
    tickets: list[Ticket] = field(default_factory=list)
    staged_windows: bool = False
    arrived: int = 0  # chunks that had come when last looked at
    wait_until: float = 0.0
    twin: _Load | None = None  # of another request, which brings what this one lacks
    twin_until: float = 0.0
    room_until: float = 0.0
    promise: _Promise | None = None
    load: _Load | None = None
    refused: bool = False  # a load failed: it is not tried again
    stale: bool = False  # computed with weights that are no more
    preemptions: int = 0
    saved: list[int] = field(default_factory=list)  # steps handed to the store, by lane
    next_save: int = 0  # tokens at which there is something to store

    @property
    def shared(self) -> bool:
        """Whether other processes could name its chunks."""
        return compat.media_are_hashed(self.request)


@dataclass(slots=True)
class _Saving:
    """A store under way: its leases end when every worker has reported."""

    leases: list[WriteLease]
    owner: _Request
    mark: bytes | None
    left: int
    loose: bool  # its blocks may be freed while the request runs
    preemptions: int
    failed: bool = False
    void: bool = False  # of an adapter that is not what it was thought to be
    fenced: bool = False


class SchedulerSide:
    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, groups: Sequence[Group], config: Config
    ) -> None:
        self._vllm_config, self._config, self._groups = vllm_config, config, groups
        self._hash_tokens = compat.hash_tokens(kv_cache_config, vllm_config)
        self._unit = unit_tokens(groups)
        if groups and self._unit % self._hash_tokens:
            raise ValueError(
                f"lmc does not serve block hashes of {self._hash_tokens} tokens with steps of "
                f"{self._unit}"
            )
        self._replicas = int(getattr(kv_cache_config, "kv_tp_replicas", 1))
        self._finds_own_blocks = bool(vllm_config.cache_config.enable_prefix_caching)
        self.stats = Stats()
        self.lanes: list[_Lane] = []
        self.kv_cache_manager: Any = None
        self._places: dict[tuple[int, int], list[Place]] | None = None
        self._num_workers = int(vllm_config.parallel_config.world_size)
        self._direct: Callable[[], Report | None] | None = None
        self._close_workers: Callable[[], None] | None = None
        self._finish_stores: Callable[[Sequence[Store]], None] | None = None
        self._adapters = Adapters(self._num_workers)
        self._requests: dict[str, _Request] = {}
        self._numbers = itertools.count()
        self._savings: dict[int, _Saving] = {}
        self._early: list[Store] = []
        self._loads: list[Load] = []
        self._loading: dict[str, _Load] = {}  # by request: until all workers have it
        self._holding: dict[str, _Request] = {}  # those with blocks of a load, until they run
        self._void: list[str] = []  # requests whose loads came too late
        self._coming: dict[Key, _Load] = {}  # by the ends of what loads bring
        self._told: dict[str, float] = {}
        self._next_news = 0.0
        self._stale_cache = False  # vLLM's own cache holds KV of weights that are no more

    def connect(self, workers: dict[tuple[int, int], Registered]) -> None:
        """The workers stand: make room for their chunks. Raises ValueError for workers that this
        process shares no memory with, and for too little RAM.
        """
        here = machine_id()
        ranks = sorted(workers)
        if any(workers[rank].machine != here for rank in ranks):
            raise ValueError("lmc does not serve an engine whose workers run on several machines")
        holders = [rank for rank in ranks if rank[1] % self._replicas == 0]
        shared = any(workers[rank].pid != os.getpid() for rank in ranks)
        layouts = [
            group.layout([n for rank in holders for n in workers[rank].page_bytes[i]])
            for i, group in enumerate(self._groups)
        ]
        told = [workers[rank] for rank in ranks]
        spaces = namespaces_of(self._vllm_config, self._config, self._groups, layouts, told)
        for group, layout, space, share in zip(
            self._groups, layouts, spaces, self._shares(layouts), strict=True
        ):
            store = TieredStore(
                layout,
                space,
                share,
                open_tiers(self._config),
                stats=self.stats,
                io_threads=max(1, self._config.io_threads // len(layouts)),
                write_queue_bytes=self._config.write_queue_bytes // len(layouts),
                shared=shared,
            )
            stride = layout.step_tokens // self._hash_tokens
            self.lanes.append(_Lane(group, layout, store, stride))
        self._places = {
            rank: [
                Place(
                    lane.store.arena.handle,
                    sum(
                        sum(workers[other].page_bytes[i])
                        for other in holders
                        if other < (rank[0], rank[1] - rank[1] % self._replicas)
                    ),
                )
                for i, lane in enumerate(self.lanes)
            ]
            for rank in ranks
        }
        if not shared and len(told) == 1:
            worker = told[0].direct
            self._direct, self._close_workers = worker.take_report, worker.close
            if compat.is_stepped_by_its_user():
                self._finish_stores = worker.finish_stores
                atexit.register(_land, weakref.ref(self))
        for known in self._requests.values():
            known.saved = [0] * len(self.lanes)
            self._plan_next_save(known)
        for lane in self.lanes:
            lane.store.warm()
        self._log_start(layouts)

    def _connect_late(self, workers: dict[tuple[int, int], Registered]) -> None:
        """`connect` while requests run: what is wrong must not end them."""
        try:
            self.connect(workers)
        except ValueError as error:
            log.warning("lmc keeps nothing: %s", error)
            for lane in self.lanes:
                lane.store.close(0.0)
            self.lanes.clear()

    def _shares(self, layouts: Sequence[KVLayout]) -> list[int]:
        """RAM of each group, so that all of them hold about as many tokens."""
        parallel = self._vllm_config.parallel_config
        replicas = max(1, int(getattr(parallel, "data_parallel_size_local", 1)))
        total = self._config.ram_bytes_of_rank(replicas)
        costs = [Arena.slot_size(layout.chunk_bytes) / layout.chunk_tokens for layout in layouts]
        return [int(total * cost / sum(costs)) for cost in costs]

    def _log_start(self, layouts: Sequence[KVLayout]) -> None:
        if not layouts:
            log.info("lmc stays off: this model has no KV cache")
            return
        log.info(
            "lmc keeps the KV of %d groups: %.1f GB of RAM, tiers: %s",
            len(layouts),
            sum(lane.store.arena.num_slots * lane.store.arena.slot_bytes for lane in self.lanes)
            / 1e9,
            ", ".join(f"{url.scheme}://{url.host}{url.path}" for url in self._config.tiers)
            or "none",
        )

    # --- a prefix comes back

    def arrived(self, request: Any) -> None:
        """Start bringing up the request's prefix; its chain is in use from now on."""
        with self.stats.timed("scheduler.arrival"):
            self._stage(self._known(request))

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded; None: ask again."""
        with self.stats.timed("scheduler.match"):
            known = self._known(request)
            self._forgive(known)
            waits = self._waits_for_mark(known)
            if computed and self._begins_on_others(known):
                self._lose_names(known)
            promise = known.promise
            rest = SMALL_REST_TOKENS if computed else 0
            if promise is not None and promise.start <= computed < promise.length - rest:
                if not self._leaves_room(known, promise.length):
                    return self._wait_for_room(known)
                promise.computed = computed
                return promise.length - computed, True
            self._break_promise(known)
            if known.refused or request.skip_reading_prefix_cache or not self.lanes:
                return 0, False
            self.poll()
            if waits:
                return None, False
            if known.mark is None:
                return 0, False
            if self._waits_for_twin(known) or self._still_staging(known):
                return None, False
            length = self._longest(known)
            if length - computed <= rest:
                self._close_tickets(known)
                return 0, False
            if self._twin_brings(known, length, computed):
                return None, False
            if not self._leaves_room(known, length):
                return self._wait_for_room(known)
            known.promise = self._pin(known, computed, length)
            self._close_tickets(known)
            return length - computed, True

    def allocated(self, request: Any, block_ids: Sequence[list[int]], tokens: int) -> None:
        """vLLM gave blocks to `tokens` tokens of a promise; 0 after the load, or if it has none."""
        with self.stats.timed("scheduler.allocate"):
            self._allocated(request, block_ids, tokens)

    # --- a prefix is kept

    def step(self, output: Any) -> Step:
        """The work of this step."""
        with self.stats.timed("scheduler.step"):
            self.poll()
            stores: list[Store] = []
            state = output.kv_connector_block_state
            for request_id, tokens in output.num_scheduled_tokens.items():
                known = self._requests.get(request_id)
                if known is not None:
                    self._save_filled(known, tokens, state, stores)
            self._save_offered(state, stores)
            places, self._places = self._places, None
            fence = self._fence(stores)
            step = Step(places, fence, self._early, stores, self._loads, self._void)
            self._early, self._loads, self._void = [], [], []
            return step

    def finished(self, request: Any, block_ids: Sequence[list[int]]) -> None:
        """The request is over and its blocks are about to be freed: keep what is not kept yet."""
        self._finished(request, block_ids)
        if self._finish_stores is not None and not self._requests:  # there may be no step any more
            self._finish_stores(self._early)
            self._early = []
            self.poll()

    def _finished(self, request: Any, block_ids: Sequence[list[int]]) -> None:
        known = self._requests.pop(request.request_id, None)
        self._holding.pop(request.request_id, None)
        if known is None:
            return
        with self.stats.timed("scheduler.finish"):
            self._break_promise(known)
            self._close_tickets(known)
            if known.load is not None:
                self._end_twin(known.load)
                if not known.load.landed:
                    return  # its blocks are half written; the lease goes when the load is over
            if not self._may_keep(known):
                return
            done = min(request.num_computed_tokens, request.num_tokens)
            if request.num_output_tokens:  # the last one was never an input
                done = min(done, request.num_tokens - 1)
            if moves := self._moves_out(known, done, block_ids, tail=True):
                self._early.append(self._begin(known, moves, loose=True, fenced=True))

    # --- upkeep

    def poll(self) -> None:
        """Apply what is over. From memory alone."""
        if self._direct is not None and self._savings and (report := self._direct()):
            self._apply(report)
        for lane in self.lanes:
            lane.store.poll()

    def update(self, output: Any) -> None:
        """What workers reported with this step's output."""
        report = output.kv_connector_worker_meta
        if isinstance(report, Report):
            if not self.lanes and len(report.registered) == self._num_workers:
                self._connect_late(report.registered)
            self._apply(report)
        failed = output.failed_recving or ()
        for request_id in output.finished_recving or ():
            if (load := self._loading.pop(request_id, None)) is not None:
                load.landed = True
                for lease in load.leases:
                    lease.release()
                if load.void and request_id not in failed:  # the workers said so before they knew
                    self._begin_again(request_id)
                    failed = {*failed, request_id}
            if request_id in failed:
                self.stats.add("load.failed")
                self._holding.pop(request_id, None)
                if load is not None:
                    self._end_twin(load)
                if (known := self._requests.get(request_id)) is not None:
                    known.refused, known.load = True, None
                    known.saved = [0] * len(self.lanes)
                    self._plan_next_save(known)

    @property
    def busy(self) -> bool:
        """Whether an idle engine has to go on stepping: for stores to end, and for what comes up
        by itself after a start.
        """
        return bool(self._savings or self._early) or any(lane.store.warming for lane in self.lanes)

    def adapters_loaded(self, loaded: Sequence[Loaded]) -> None:
        """What workers loaded, in their order: from now on that is what adapters stand for."""
        for load in loaded:
            self._adapters.apply(load)
            for saving in self._savings.values():
                if _contradicts(load, saving.owner.request, saving.mark):
                    saving.void = True
            for known in self._requests.values():
                if _contradicts(load, known.request, known.mark):
                    self._lose_names(known)

    def reset(self) -> bool:
        """vLLM's caches were reset, as after a change of weights: nothing stored is found again.
        What was computed before is not kept, nor is vLLM's own cache if its reset failed.
        """
        self._adapters.forget_blocks()
        for known in self._requests.values():
            self._break_promise(known)
            known.tickets.clear()  # the store closes them
            known.keys.clear()
            known.stale = known.stale or known.request.num_computed_tokens > 0
        for lane in self.lanes:
            lane.store.renew()
        self._coming.clear()
        self._void += self._loading
        for load in self._loading.values():
            load.void = True
        self._stale_cache = self._vllm_holds_old_kv()
        return True

    def snapshot(self) -> dict[str, float]:
        """Counters of all groups; gauges summed over them."""
        return self.stats.snapshot() | self.gauges()

    def gauges(self) -> dict[str, float]:
        gauges: Counter[str] = Counter()
        for lane in self.lanes:
            gauges.update(lane.store.gauges())
        return dict(gauges)

    def news(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """What was counted since the last call, and gauges; None if it was less than NEWS_S ago."""
        now = time.monotonic()
        if now < self._next_news:
            return None
        self._next_news = now + NEWS_S
        counted = {n: v for n, v in self.stats.snapshot().items() if not n.endswith("longest_s")}
        counts = {n: v - self._told.get(n, 0) for n, v in counted.items()}
        self._told = counted
        return {n: v for n, v in counts.items() if v}, self.gauges()

    def close(self) -> None:
        """Let stores end and give everything back."""
        if self._close_workers is not None:
            self._close_workers()
            self.poll()
        for saving in self._savings.values():
            for write in saving.leases:
                write.abort()
        self._savings.clear()
        for known in self._requests.values():
            self._break_promise(known)
            self._close_tickets(known)
        for load in self._loading.values():
            for lease in load.leases:
                lease.release()
        self._loading.clear()
        self._adapters.close()
        for lane in self.lanes:
            lane.store.close(CLOSE_DRAIN_S / len(self.lanes))

    # --- inside: requests and keys

    def _known(self, request: Any) -> _Request:
        known = self._requests.get(request.request_id)
        if known is None or known.request is not request:
            if known is not None:  # another one under the same id
                self._break_promise(known)
                self._close_tickets(known)
            known = _Request(request, saved=[0] * len(self.lanes))
            if request.lora_request is not None:
                known.mark, known.look = None, self._adapters.look(request.lora_request)
            self._requests[request.request_id] = known
            self._plan_next_save(known)
        return known

    def _waits_for_mark(self, known: _Request) -> bool:
        """Whether it is still to be seen what the adapter of a request is; not longer than staging
        may take.
        """
        if known.look is None:
            return False
        if known.look.done():
            known.mark = self._adapters.mark(known.request.lora_request, known.look.result())
            known.look = None
            self._stage(known)
            return False
        now = time.monotonic()
        known.wait_until = known.wait_until or now + self._config.stage_wait_s
        if now < known.wait_until:
            return True
        known.look = None
        self.stats.add("adapter.late")
        return False

    def _begins_on_others(self, known: _Request) -> bool:
        """Whether blocks that vLLM has may be of other contents of the same adapter."""
        lora, mark = known.request.lora_request, known.mark
        return lora is not None and mark is not None and self._adapters.was_another(lora, mark)

    def _lose_names(self, known: _Request) -> None:
        """A request whose KV is of one adapter and another, or of nobody knows which: lmc has
        nothing to do with it any more.
        """
        self._break_promise(known)
        self._close_tickets(known)
        known.mark, known.look = None, None
        known.keys.clear()
        if known.load is not None and not known.load.landed:
            self._end_twin(known.load)
            self._void.append(known.request.request_id)
            known.load.void = True

    def _may_keep(self, known: _Request) -> bool:
        """Whether what a request computes has a name, and that name tells the truth."""
        return known.mark is not None and not known.stale and not self._stale_cache

    def _keys(self, known: _Request, i: int) -> list[Key]:
        """The keys of a lane's steps, as many as there are whole ones."""
        stride = self.lanes[i].hashes_a_step
        hashes = known.request.block_hashes
        assert known.mark is not None
        if stride == 1 and not known.mark:
            return hashes  # type: ignore[no-any-return]
        if not known.keys:
            known.keys = [[] for _ in self.lanes]
        keys = known.keys[i]
        del keys[len(hashes) // stride :]  # a session may have taken tokens back
        for at in range((len(keys) + 1) * stride - 1, len(hashes), stride):
            key = hashes[at]
            keys.append(folded(known.mark, key) if known.mark else key)
        return keys

    # --- inside: hits

    def _stage(self, known: _Request) -> None:
        if known.mark is None or not known.shared or known.request.skip_reading_prefix_cache:
            return
        self._close_tickets(known)
        for i, lane in enumerate(self.lanes):
            if lane.group.kind is Kind.FULL:
                known.tickets.append(lane.store.stage(tuple(self._keys(known, i))))

    def _still_staging(self, known: _Request) -> bool:
        """Whether chunks are on their way, and came not longer ago than the wait for the next."""
        if not known.tickets and known.staged_windows:
            return False
        now = time.monotonic()
        arrived = sum(ticket.arrived for ticket in known.tickets)
        if not known.wait_until or arrived > known.arrived:
            known.arrived, known.wait_until = arrived, now + self._config.stage_wait_s
        if now < known.wait_until and any(ticket.moving for ticket in known.tickets):
            return True
        if not known.staged_windows:
            known.staged_windows = True
            if known.shared and self._stage_windows(known):
                known.wait_until = now + self._config.stage_wait_s
                return any(ticket.moving for ticket in known.tickets)
        return False

    def _stage_windows(self, known: _Request) -> bool:
        """Bring up what groups need of the end of the longest prefix; whether there are any."""
        length = self._longest_full(known)
        staged = False
        for i, lane in enumerate(self.lanes):
            if lane.group.kind is not Kind.FULL and length:
                per_step, whole = lane.layout.step_tokens, lane.layout.chunk_steps
                first = lane.group.first_needed(length) // per_step // whole * whole
                keys = self._keys(known, i)[first : length // per_step]
                known.tickets.append(lane.store.stage(keys))
                staged = True
        return staged

    def _longest_full(self, known: _Request) -> int:
        """Tokens every group with full attention holds; all there are if there is no such group."""
        length = len(known.request.block_hashes) * self._hash_tokens
        for i, lane in enumerate(self.lanes):
            if lane.group.kind is Kind.FULL:
                steps = lane.store.lookup(self._keys(known, i))
                length = min(length, steps * lane.layout.step_tokens)
        return length // self._unit * self._unit

    def _longest(self, known: _Request) -> int:
        """The longest prefix every group can serve, in tokens."""
        length = self._longest_full(known)
        num_tokens = known.request.num_tokens
        if length == num_tokens and not all(lane.group.serves_whole(length) for lane in self.lanes):
            length -= self._unit
        looks = MAX_LOOKS
        while length > 0 and (limit := self._limit(known, length)) < length:
            length = limit // self._unit * self._unit
            looks -= 1
            if not looks:
                return 0
        return length

    def _limit(self, known: _Request, length: int) -> int:
        """The longest prefix up to `length` that is not ruled out by what a group lacks of
        `length`'s end.
        """
        for i, lane in enumerate(self.lanes):
            if lane.group.kind is not Kind.FULL:
                per_step = lane.layout.step_tokens
                first = lane.group.first_needed(length) // per_step
                keys = self._keys(known, i)[first : length // per_step]
                steps = lane.store.lookup(keys, first)
                if steps < len(keys):
                    return (first + steps) * per_step
        return length

    def _pin(self, known: _Request, start: int, length: int) -> _Promise:
        leases = []
        for i, lane in enumerate(self.lanes):
            per_step = lane.layout.step_tokens
            first = max(start, lane.group.first_needed(length)) // per_step
            keys = self._keys(known, i)[first : length // per_step]
            leases.append(lane.store.acquire(keys, first))
        return _Promise(start, length, leases, start)

    def _break_promise(self, known: _Request) -> None:
        if known.promise is not None:
            for lease in known.promise.leases:
                if lease:
                    lease.release()
            known.promise = None

    def _close_tickets(self, known: _Request) -> None:
        for ticket in known.tickets:
            ticket.close()
        known.tickets.clear()

    def _allocated(self, request: Any, block_ids: Sequence[list[int]], tokens: int) -> None:
        known = self._known(request)
        if tokens == 0:
            self._break_promise(known)
            self._holding.pop(request.request_id, None)
            if known.load is not None and known.load.landed:
                self._end_twin(known.load)
                known.load = None
            return
        promise, known.promise = known.promise, None
        if promise is None:  # vLLM loads what nobody promised: never serve what is not there
            self._loads.append(Load(request.request_id, None))
            return
        start = promise.computed
        moves = None
        if start + tokens == promise.length:
            moves = self._moves_in(promise, start, block_ids)
        load = known.load = _Load(promise.length, promise.leases)
        self._loading[request.request_id] = load
        self._holding[request.request_id] = known
        self._loads.append(Load(request.request_id, moves))
        if moves is None:
            log.error("lmc: blocks of request %s are not what was promised", request.request_id)
            return
        self._announce(known, load, start)
        for i, lane in enumerate(self.lanes):
            known.saved[i] = max(known.saved[i], load.length // lane.layout.step_tokens)
        self._plan_next_save(known)
        self.stats.add("tokens.loaded", tokens)

    def _moves_in(
        self, promise: _Promise, start: int, block_ids: Sequence[list[int]]
    ) -> list[Move] | None:
        """What to copy into the blocks of tokens `start` to the promise's end; None if that is not
        what is pinned.
        """
        moves = []
        for lane, lease in zip(self.lanes, promise.leases, strict=True):
            block = lane.group.block_tokens
            ids = block_ids[lane.group.id][: promise.length // block]
            first = start // block
            while first < len(ids) and ids[first] == compat.NULL_BLOCK:
                first += 1  # vLLM keeps nothing there
            ids = ids[first:]
            if not ids:
                continue
            runs = _runs_of(lane.layout, lease.spans, promise.length, first)
            if runs is None or compat.NULL_BLOCK in ids or sum(r.pages for r in runs) != len(ids):
                return None
            moves.append(Move(lane.group.id, ids, runs))
        return moves

    def _leaves_room(self, known: _Request, length: int) -> bool:
        """Whether blocks for a load leave those that requests with a load need to go on. For groups
        that keep the end of a prefix only vLLM counts too few; then requests hold what each other
        waits for, and none of them ends.
        """
        others = [other for other in self._holding.values() if other is not known]
        if not others or all(lane.group.kind is Kind.FULL for lane in self.lanes):
            return True
        needed = self._blocks_to_go_on(known, length)
        for lane in self.lanes:
            needed += length // lane.group.block_tokens - lane.group.first_block(length)
        for other in others:
            if other.load is not None:
                needed += self._blocks_to_go_on(other, other.load.length)
        return needed <= compat.free_blocks(self.kv_cache_manager)

    def _wait_for_room(self, known: _Request) -> tuple[int | None, bool]:
        """Ask again; but not for ever: to compute a prefix is slower, but vLLM can interrupt it."""
        now = time.monotonic()
        known.room_until = known.room_until or now + WAIT_FOR_ROOM_S
        if now < known.room_until:
            return None, False
        self._break_promise(known)
        return 0, False

    def _blocks_to_go_on(self, known: _Request, length: int) -> int:
        """Blocks that vLLM wants free to compute what follows `length` tokens, at most."""
        blocks = 0
        for lane in self.lanes:
            block = lane.group.block_tokens
            left = -(-known.request.num_tokens // block) - length // block
            if lane.group.kind is Kind.STATE:
                left = min(left, STATE_BLOCKS)
            elif lane.group.kind is not Kind.FULL:
                left = min(left, self._vllm_config.max_in_flight_tokens // block + 2)
            blocks += left
        return blocks

    # --- inside: loads of the same blocks

    def _twin_brings(self, known: _Request, length: int, computed: int) -> bool:
        """Whether another request's load brings most of what is missing, so that waiting for it
        gives the same blocks at once; not longer than WAIT_FOR_TWIN_S.
        """
        if not self._coming or not self._finds_own_blocks or known.load is not None:
            return False
        now = time.monotonic()
        known.twin_until = known.twin_until or now + WAIT_FOR_TWIN_S
        if now >= known.twin_until:
            return False
        keys, per_step = self._keys(known, 0), self.lanes[0].layout.step_tokens
        whole = self.lanes[0].layout.chunk_steps
        steps = length // per_step
        ends = [steps, *range(steps // whole * whole, computed // per_step, -whole)]
        for end in ends:
            load = self._coming.get(keys[end - 1])
            if load is not None:
                brought: int = end * per_step - computed
                if brought > max(self._unit, (length - computed) // 2):
                    known.twin = load
                break
        return known.twin is not None

    def _waits_for_twin(self, known: _Request) -> bool:
        """Whether the load that brings what is missing is still on its way."""
        if known.twin is not None and not (known.twin.ends and time.monotonic() < known.twin_until):
            known.twin = None
        return known.twin is not None

    def _announce(self, known: _Request, load: _Load, start: int) -> None:
        keys, per_step = self._keys(known, 0), self.lanes[0].layout.step_tokens
        whole, steps = self.lanes[0].layout.chunk_steps, load.length // per_step
        ends = {steps, *range(steps // whole * whole, start // per_step, -whole)} - {0}
        for key in (keys[end - 1] for end in ends):
            if self._coming.setdefault(key, load) is load:
                load.ends.append(key)

    def _end_twin(self, load: _Load) -> None:
        for key in load.ends:
            if self._coming.get(key) is load:
                del self._coming[key]
        load.ends.clear()

    # --- inside: stores

    def _save_filled(self, known: _Request, tokens: int, state: Any, stores: list[Store]) -> None:
        """Store the chunks that this step completes, and the prompt's tail once it is read."""
        request = known.request
        if not self._may_keep(known):
            return
        if request.num_preemptions != known.preemptions:  # it began again
            known.preemptions = request.num_preemptions
            known.saved = [
                min(saved, request.num_computed_tokens // lane.layout.step_tokens)
                for saved, lane in zip(known.saved, self.lanes, strict=True)
            ]
            self._plan_next_save(known)
        done = min(request.num_computed_tokens + tokens, request.num_tokens)
        prompt_ends = request.num_computed_tokens < request.num_prompt_tokens <= done
        if done < known.next_save and not prompt_ends:
            return
        block_ids = state.get_block_ids(request.request_id)
        if block_ids is not None and (
            moves := self._moves_out(known, done, block_ids, tail=prompt_ends)
        ):
            loose = any(self._groups[move.group].kind is not Kind.FULL for move, _ in moves)
            stores.append(self._begin(known, moves, loose=loose))
        self._plan_next_save(known)

    def _plan_next_save(self, known: _Request) -> None:
        known.next_save = min(
            (
                (saved // lane.layout.chunk_steps + 1) * lane.layout.chunk_tokens
                for saved, lane in zip(known.saved, self.lanes, strict=True)
                if not lane.group.offered
            ),
            default=1 << 62,
        )

    def _moves_out(
        self, known: _Request, done: int, block_ids: Sequence[list[int]], *, tail: bool
    ) -> list[tuple[Move, WriteLease]]:
        """Reserve room for chunks that are complete at `done` tokens and not stored yet."""
        moves = []
        for i, lane in enumerate(self.lanes):
            if lane.group.offered:
                continue
            keys, layout = self._keys(known, i), lane.layout
            whole = layout.chunk_steps
            steps = min(done // layout.step_tokens, len(keys))
            if not tail:
                steps = steps // whole * whole
            saved = known.saved[i]
            if steps <= saved:
                continue
            ids = block_ids[lane.group.id]
            chunks, begins = [], []
            for begin in range(saved // whole * whole, steps, whole):
                end = min(begin + whole, steps)
                blocks = ids[begin * layout.step_pages : end * layout.step_pages]
                if lane.group.kind is Kind.STATE:  # a state is the block's at its end alone
                    blocks = blocks[-1:]
                if compat.NULL_BLOCK in blocks or len(blocks) < (end - begin) * layout.step_pages:
                    continue  # it slid out of the window, or lies outside of what is computed
                parent = keys[begin - 1] if begin and lane.group.kind is Kind.FULL else None
                chunks.append(Chunk(tuple(keys[begin:end]), parent))
                begins.append(blocks)
            known.saved[i] = steps
            moves += self._reserve(lane, known, chunks, begins)
        return moves

    def _reserve(
        self,
        lane: _Lane,
        known: _Request,
        chunks: Sequence[Chunk],
        blocks: Sequence[list[int]],
    ) -> list[tuple[Move, WriteLease]]:
        if not chunks:
            return []
        lease = lane.store.reserve(chunks, spill=known.shared)
        if not lease:
            return []
        number = {id(chunk): n for n, chunk in enumerate(chunks)}
        runs, ids = [], []
        for chunk, slot in zip(lease.chunks, lease.slots, strict=True):
            mine = blocks[number[id(chunk)]]
            ids += mine
            runs.append(Run(slot, len(mine), 0, len(mine)))
        return [(Move(lane.group.id, ids, runs), lease)]

    def _save_offered(self, state: Any, stores: list[Store]) -> None:
        """Store the states that vLLM hands over, each at a boundary it names."""
        for request_id, offers in getattr(state, "boundary_state_offloads", {}).items():
            known = self._requests.get(request_id)
            if known is None or not self._may_keep(known) or not self.lanes:
                continue
            moves = []
            for group_id, block_id, tokens in offers:
                lane = self.lanes[group_id]
                keys, per_step = self._keys(known, group_id), lane.layout.step_tokens
                if tokens % per_step == 0 and 0 < tokens // per_step <= len(keys):
                    chunk = Chunk((keys[tokens // per_step - 1],), None)
                    moves += self._reserve(lane, known, [chunk], [[block_id]])
            if moves:
                stores.append(self._begin(known, moves, loose=True))

    def _begin(
        self,
        known: _Request,
        moves: Sequence[tuple[Move, WriteLease]],
        *,
        loose: bool,
        fenced: bool = False,
    ) -> Store:
        number = next(self._numbers)
        leases = [lease for _, lease in moves]
        preemptions = known.request.num_preemptions
        self._savings[number] = _Saving(
            leases, known, known.mark, self._num_workers, loose, preemptions, fenced=fenced
        )
        return Store(number, [move for move, _ in moves])

    def _fence(self, begun: Sequence[Store]) -> list[int]:
        """Stores of earlier steps whose blocks are vLLM's to give away by now."""
        now = {store.job for store in begun}
        fence = []
        for number, saving in self._savings.items():
            if number in now or saving.fenced:
                continue
            owner = saving.owner
            gone = self._requests.get(owner.request.request_id) is not owner
            if gone or saving.loose or owner.request.num_preemptions != saving.preemptions:
                saving.fenced = True
                fence.append(number)
        return fence

    def _apply(self, report: Report) -> None:
        self.adapters_loaded(report.loaded)
        for number, workers in report.over.items():
            saving = self._savings.get(number)
            if saving is None:
                continue
            saving.left -= workers
            saving.failed = saving.failed or number in report.failed
            if saving.left <= 0:
                del self._savings[number]
                sound = self._is_sound(saving)
                with self.stats.timed("scheduler.commit"):
                    for lease in saving.leases:
                        if sound:
                            lease.commit()
                        else:
                            lease.abort()
                if not sound:
                    self.stats.add("store.failed" if saving.failed else "store.void")

    def _is_sound(self, saving: _Saving) -> bool:
        """Whether a store that is over holds what its keys say; see `adapters`."""
        lora = saving.owner.request.lora_request
        if saving.failed or saving.void or saving.mark is None:
            return False
        return lora is None or self._adapters.computes(lora, saving.mark)

    # --- inside: weights that changed

    def _vllm_holds_old_kv(self) -> bool:
        """Whether vLLM's own cache holds something, or will: requests that go on cache blocks."""
        if not self._finds_own_blocks:
            return False
        return not compat.local_cache_is_empty(self.kv_cache_manager) or any(
            known.stale and known.request.num_computed_tokens for known in self._requests.values()
        )

    def _begin_again(self, request_id: str) -> None:
        """Have vLLM compute a request whose load it is about to hear the end of: what it does
        itself where a load failed.
        """
        if (known := self._requests.get(request_id)) is not None:
            known.request.num_computed_tokens = 0
            self.kv_cache_manager.free(known.request)

    def _forgive(self, known: _Request) -> None:
        """A request that begins, or begins again, on a cache that holds nothing old is as good as
        new. Asked before vLLM gives it blocks: these are in the cache at once.
        """
        if self._stale_cache:
            self._stale_cache = self._vllm_holds_old_kv()
        known.stale = known.stale and self._stale_cache


def _land(side: weakref.ref[SchedulerSide]) -> None:
    """At the end of a script: what was stored reaches its tiers."""
    if (one := side()) is not None:
        for lane in one.lanes:
            lane.store.drain(CLOSE_DRAIN_S / len(one.lanes))


def _contradicts(load: Loaded, request: Any, mark: bytes | None) -> bool:
    """Whether a request's KV may be of another adapter than its mark says, now that a worker loaded
    this one under its number or, for vLLM's own cache, under its name.
    """
    lora = request.lora_request
    if lora is None or mark is None or mark == load.digest:
        return False
    return load.number == lora.lora_int_id or load.name == (lora.lora_name, lora.lora_path)


def _runs_of(
    layout: KVLayout, spans: Sequence[Span], length: int, first_block: int
) -> list[Run] | None:
    """Where the blocks from `first_block` up to `length` tokens lie; None if spans begin later."""
    per_step = layout.step_pages
    at = length // layout.page_tokens - sum(span.steps for span in spans) * per_step
    if at > first_block:
        return None
    runs = []
    for span in spans:
        pages = span.steps * per_step
        skip = min(max(0, first_block - at), pages)
        if pages > skip:
            first = span.first * per_step + skip
            runs.append(Run(span.slot, span.total * per_step, first, pages - skip))
        at += pages
    return runs
