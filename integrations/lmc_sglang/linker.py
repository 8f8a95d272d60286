"""The linker between SGLang's radix cache and lmc's store. Owned by the scheduler thread of one
rank.

SGLang keeps tree, admission, slots, locks and the agreement of ranks. It asks in pages, by chained
page digests, and counts from the first page that is not on the device; lmc answers in steps at
absolute positions. Hooks (compat.py) say where a match or a node begins, which requests arrive, and
when weights change.

    arrival  -> stage                                      chunks start on their way up
    lookup   -> pin until the end of the scheduling pass   what is promised stays in RAM
    load     -> the pin is the request's                   the forward waits layer by layer
    offload  -> reserve, copy in the background, commit    always accepted, completed in order

Copies on a GPU run in streams of their own, after what SGLang's streams hold when they are asked
for: pages that were freed may still be written by a forward that runs, and pages to be stored are
written by one. What a copy reads or writes is held until its event is seen to be over, by looking,
never by waiting; SGLang's own streams wait for a load where they use or reuse its pages.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.utils import get_storage_hash_str

from lmc.config import Config
from lmc.stats import Stats
from lmc.store import Ticket, TieredStore
from lmc.tiers import open_tiers
from lmc.transfer import Job, Transfer, copier_of, resolve

from . import compat, pools
from .adapters import Adapters
from .identity import Ranks, namespace_of
from .lanes import Lane, Move, layout_of, shares_of
from .layers import LayerCounter
from .patience import MIN_PREFILL_TOKENS, Outlook, Patience, Wait
from .pools import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmc.tiers.ram import ReadLease, WriteLease

log = logging.getLogger("lmc")

CLOSE_DRAIN_S = 60.0
NAP_S = 0.001
"""An idle engine looks this often for chunks that its requests wait for."""
PASSES_OF_A_LOAD = 50
"""Scheduling passes after which what a load brought is in the tree, or never will be."""
WAIT_FOR_TWIN_S = 2.0
"""Longest wait for a load of the same pages that another request began."""
MAX_ENDS = 32
"""Ends of states among which ranks look for a common one."""


@dataclass(slots=True)
class _Arrival:
    """A request that may still be looked up."""

    digests: Sequence[str]
    tickets: list[Ticket]  # of full attention, then of what else a prefix needs
    wait: Wait = field(default_factory=Wait)
    twin_until: float = 0.0

    @property
    def moving(self) -> bool:
        return any(ticket.moving for ticket in self.tickets)

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.close()


@dataclass(slots=True)
class _Promise:
    """What was answered in this pass and not asked for yet: all of it is pinned."""

    first_page: int
    lease: ReadLease  # of full attention
    others: list[ReadLease]

    def release(self) -> None:
        for lease in (self.lease, *self.others):
            lease.release()


@dataclass(slots=True)
class _Load:
    """Pages of one request on their way to the device: queued, then moving."""

    leases: list[ReadLease]
    moves: list[Move]

    def release(self) -> None:
        for lease in self.leases:
            lease.release()


@dataclass(slots=True)
class _Offload:
    """One node on its way into RAM; `kept` is what SGLang is told when its turn comes."""

    kept: bool
    job: Job | None = None
    leases: list[WriteLease] = field(default_factory=list)
    unlock: Callable[[], None] = lambda: None


class LmcLinker(UnifiedCacheLinker):  # type: ignore[misc]
    """See the module. Built by SGLang in every rank's scheduler process.

    Raises ValueError for a setting, a pool or a topology it does not serve, RuntimeError for an
    unknown SGLang.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        compat.check()
        if extra_config:
            raise ValueError(
                f"LmcLinker takes no extra config, settings are LMC_*: {sorted(extra_config)}"
            )
        config = Config.from_env()
        config.refuse_unknown()
        described = pools.describe(params, components)
        ranks = [Ranks.of(server_args, params, replicated=pool.replicated) for pool in described]
        self.forward_stream = forward_stream
        self.pools = dict.fromkeys(map(PoolName, (pool.name for pool in described)))
        self.pools[PoolName.KV] = params.token_to_kv_pool_allocator.get_kvcache()
        self.layer_done_counter = LayerCounter(max(pool.num_layers for pool in described))
        if any(pool.kind is Kind.STATE for pool in described):
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._agreeing = ranks[0].agreeing
        self.adapters = Adapters()
        self._page_tokens = params.page_size
        self._is_eagle = bool(params.is_eagle)
        self._patience = Patience(config.stage_wait_s)
        self._io_threads = config.io_threads
        device = described[0].pages.device
        self._copier = copier_of(
            resolve(config.kernels, device, copy=config.gpu_copy, blocks=config.gpu_blocks),
            lambda: compat.engine_streams(device, self.forward_stream),
        )
        self.stats = Stats()
        any_page = len(described) > 1  # windows and states end where SGLang's nodes do
        layouts = [
            layout_of(pool, params.page_size, config.chunk_tokens, any_page=any_page)
            for pool in described
        ]
        ram_bytes = config.ram_bytes_of_rank(ranks[0].on_this_machine)
        self.lanes = [
            Lane(
                pool,
                layout,
                TieredStore(
                    layout,
                    namespace_of(server_args, config, pool, layout, of_pool),
                    share,
                    open_tiers(config),
                    stats=self.stats,
                    io_threads=max(1, config.io_threads // len(layouts)),
                    write_queue_bytes=config.write_queue_bytes // len(layouts),
                ),
                layouts[0].step_pages,
                writes=of_pool.writes,
            )
            for pool, layout, of_pool, share in zip(
                described, layouts, ranks, shares_of(layouts, described, ram_bytes), strict=True
            )
        ]
        self._by_name = {PoolName(lane.pool.name): lane for lane in self.lanes}
        for lane in self.lanes:
            self._copier.pin(lane.store.arena.slices)
        self._device_pages = 0  # of the match that is under way
        self._node: tuple[Any, int] | None = None  # whose offload is under way
        self._arrivals: dict[str, _Arrival] = {}  # in order of arrival
        self._staging: dict[str, _Arrival] = {}  # of them: full attention is on its way
        self._landing_for: dict[str, _Arrival] = {}  # something is on its way, maybe for nobody
        self._ready = True  # for the request that is matched
        self._passed_over: set[str] = set()  # as all ranks agreed when they were last matched
        self._napped = False  # in this scheduling pass
        self._coming: dict[str, int] = {}  # ends of what loads bring; passes until it is there
        self._promised: dict[str, _Promise] = {}
        self._queued: dict[str, _Load] = {}
        self._moving: dict[int, tuple[Job, list[_Load]]] = {}  # by counter index
        self._landing: list[tuple[Job, list[_Load]]] = []  # SGLang has been told of them
        self._offloads: deque[_Offload] = deque()
        self._tree_used = False  # since the last flush
        self._stale_tree = False  # the device holds KV of weights that are no more
        get_storage_hash_str(
            RadixKey([0]), None, page_size=1
        )  # builds SGLang's hash now, not in a request
        for lane in self.lanes:
            lane.store.warm()
        compat.listen(self)

    # --- what the hooks report

    def match_begins(self, rid: str | None, device_pages: int) -> None:
        self._device_pages = device_pages
        self._tree_used = self._ready = True
        self._passed_over.discard(rid or "")

    def ready(self) -> bool:
        """Whether the request that is matched need not wait, as far as this rank knows."""
        return self._ready

    def agreed(self, rid: str, *, ready: bool) -> None:
        """All ranks have said whether it need not wait."""
        if not ready:
            self._passed_over.add(rid)

    def passes_over(self, rid: str) -> bool:
        return rid in self._passed_over

    def admitted(self, rid: str) -> None:
        """It runs: what was staged for it and not asked for need not stay."""
        self._forget_arrival(rid)

    def nap(self) -> None:
        """The engine has nothing to do but wait for chunks: once a pass, and not for long."""
        if not self._napped:
            self._napped = True
            self.lanes[0].store.poll(NAP_S)

    def prefilled(self, tokens: int, seconds: float) -> None:
        if tokens >= MIN_PREFILL_TOKENS:
            self._patience.prefill.add(tokens, seconds)

    def offload_begins(self, cache: Any, node_id: int) -> None:
        self._node = (cache, node_id)
        self._tree_used = True

    def request_arrived(self, req: Any) -> None:
        """Start bringing up the request's prefix; its chain is in use from now on, the device's
        part of it too.
        """
        with self.stats.timed("scheduler.arrival"):
            self._forget_arrival(req.rid)
            self._forget_old_arrivals()
            page = self._page_tokens
            tokens = req.origin_input_ids
            if req.output_ids:  # retracted: what it had generated comes back too
                tokens = tokens + req.output_ids
            key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
            key, _ = key.maybe_to_bigram_view(self._is_eagle)
            num_tokens = (len(key) - 1) // page * page
            if num_tokens > 0 and self.adapters.lasting(req.lora_id):
                digests = get_storage_hash_str(key[:num_tokens], None, page_size=page)
                full, *others = self.lanes
                arrival = _Arrival(digests, [full.store.stage(full.steps(digests, 0)[1])])
                self._arrivals[req.rid] = self._landing_for[req.rid] = arrival
                if others:
                    for lane in others:
                        lane.touch(digests)
                    self._staging[req.rid] = arrival
                    self._stage_others(req.rid)

    def request_aborted(self, rid: str) -> None:
        self._forget_arrival(rid)
        self._break_promise(rid)

    def weights_changed(self) -> None:
        """Nothing stored is found again; the tree's KV is not kept until it was flushed."""
        for lane in self.lanes:
            lane.store.renew()
        for known in (self._arrivals, self._staging, self._landing_for, self._passed_over):
            known.clear()
        for rid in list(self._promised):
            self._break_promise(rid)
        self._stale_tree = self._stale_tree or self._tree_used

    def snapshot(self) -> dict[str, float]:
        gauges = Counter(self.lanes[0].store.gauges())
        for lane in self.lanes[1:]:
            gauges.update(lane.store.gauges())
        return self.stats.snapshot() | gauges

    # --- from store to device

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        started = time.perf_counter()
        digests, first = transfers[0].keys, self._device_pages
        full, *others = self.lanes
        for lane in self.lanes:
            lane.store.poll()
        self._break_promise(rid)
        lease = full.acquire(digests, first, first + len(digests))
        ends: list[int] = []
        if lease:
            per_step = full.layout.step_pages
            ends = self._ends(digests, first, (first // per_step + lease.steps) * per_step)
            held = [lane.acquire(digests, first, end) for end in ends for lane in others]
            self._promised[rid] = _Promise(first, lease, held)
        if (arrival := self._arrivals.get(rid)) is not None:
            self._ready = not (
                self._waits(rid, arrival) or self._waits_for_twin(arrival, digests, ends, first)
            )
        self.stats.spent("scheduler.lookup", time.perf_counter() - started)
        return [end - first for end in ends]

    def load(self, rid: str, transfers: list[Any]) -> bool:
        with self.stats.timed("scheduler.load"):
            self.cancel_queued_load(rid)
            promise = self._promised.pop(rid, None)
            if promise is None:
                return False
            load = self._load_of(promise, transfers)
            if load is None:
                log.error("lmc: SGLang asks for other pages than were promised to %s", rid)
                return False
            self._queued[rid] = load
            self._coming.update(dict.fromkeys(transfers[0].keys[-1:], PASSES_OF_A_LOAD))
            self._forget_arrival(rid)
            return True

    def _load_of(self, promise: _Promise, transfers: list[Any]) -> _Load | None:
        """A promise, cut to what ranks agreed on and SGLang made room for; None where that is
        something else.
        """
        first, digests = promise.first_page, transfers[0].keys
        end = first + len(digests)
        load = _Load([promise.lease], [])
        for transfer in transfers:
            lane, lease = self._by_name[transfer.name], promise.lease
            if lane.kind is not Kind.FULL:
                lease = lane.acquire(digests, first, end)
                load.leases.append(lease)
            if (move := lane.load(lease, end, transfer.device_indices)) is not None:
                load.moves.append(move)
        for held in promise.others:
            held.release()
        if len(load.moves) == len(self.lanes):
            return load
        load.release()
        return None

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        with self.stats.timed("scheduler.start_load"):
            loads = list(self._queued.values())
            self._queued.clear()
            transfers = []
            for lane in self.lanes:
                moves = [move for load in loads for move in load.moves if move.lane is lane]
                page_ids = torch.cat([move.page_ids for move in moves])
                pieces = [piece for move in moves for piece in move.pieces]
                transfers.append(Transfer(lane.pool.pages, page_ids, pieces))
            job = self._copier.load(transfers, layers=True)
            index = self.layer_done_counter.begin(job)
            self._moving[index] = (job, loads)
            self.stats.add("pages.loaded", len(transfers[0].page_ids))
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """From now on SGLang may free these pages: what it does with them comes after the load,
        layers that no forward read included. Only a call that was refused can fail a load on a GPU,
        and that is known by now.
        """
        self.layer_done_counter.end(counter_index)
        if (moving := self._moving.pop(counter_index, None)) is None:
            return True
        job, _ = moving
        self._copier.fence([job])
        self._landing.append(moving)
        self._let_go()
        if job.error is not None:
            log.error("lmc could not load KV: %s", job.error)
        return job.error is None

    def cancel_queued_load(self, rid: str) -> bool:
        load = self._queued.pop(rid, None)
        if load is not None:
            load.release()
        return load is not None

    # --- from device to store

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Always accepted: what ranks count must not depend on what fits here."""
        with self.stats.timed("scheduler.offload"):
            node, self._node = self._node, None
            if self._stale_tree or node is None:
                self._offloads.append(_Offload(kept=True))
                return True
            cache, node_id = node
            path = cache.tree_core.collect_path_info([node_id])[0]
            offload, moves = _Offload(kept=True), []
            lasting = self.adapters.lasting_node(cache.tree_core, node_id)
            for transfer in transfers:
                lane = self._by_name[transfer.name]
                source = self._source(lane, cache, path, transfer, offload)
                if source is None:  # a node without digests: no names, hence nothing to keep
                    continue
                digests, first, slots = source
                begin, chunks = lane.chunks(digests, first)
                lease = lane.store.reserve(chunks, spill=lane.writes and lasting)
                if len(lease) < len(chunks) and not lane.covers(chunks, lease):
                    offload.kept = False
                if lease:
                    offload.leases.append(lease)
                    skip = (begin - first) * self._page_tokens
                    moves.append(lane.save(slots()[skip:], chunks, lease))
            if moves:
                offload.job = self._copier.store(moves)
            self._offloads.append(offload)
            return True

    def num_completed_offloads(self) -> int:
        """SGLang asks once a scheduler step, before it looks anything up: a new scheduling pass."""
        with self.stats.timed("scheduler.step"):
            self._napped = False
            self._coming = {end: left - 1 for end, left in self._coming.items() if left}
            for rid in list(self._promised):
                self._break_promise(rid)
            self._let_go()
            for lane in self.lanes:
                lane.store.poll()
            for rid in list(self._staging):
                self._stage_others(rid)
            for rid in list(self._landing_for):
                self._measure(rid)
            done = 0
            for offload in self._offloads:
                if offload.job is not None and not offload.job.done():
                    break
                self._settle(offload)
                done += 1
            return done

    def pop_completed_offload(self) -> bool:
        offload = self._offloads.popleft()
        offload.unlock()
        return offload.kept

    # --- life

    def reset(self) -> None:
        """SGLang flushed its tree: copies end, promises go, what is stored stays."""
        self._quiesce()
        self.layer_done_counter.reset()
        self._stale_tree = self._tree_used = False

    def close(self) -> None:
        compat.stop_listening(self)
        self._quiesce()
        for rid in list(self._arrivals):
            self._forget_arrival(rid)
        self._copier.close()
        deadline = time.monotonic() + CLOSE_DRAIN_S
        for lane in self.lanes:
            lane.store.close(max(0.0, deadline - time.monotonic()))

    # --- inside

    def _break_promise(self, rid: str) -> None:
        if (promise := self._promised.pop(rid, None)) is not None:
            promise.release()

    def _let_go(self) -> None:
        """Chunks of loads that are over need not stay."""
        landing, self._landing = self._landing, []
        for job, loads in landing:
            if job.done():
                for load in loads:
                    load.release()
            else:
                self._landing.append((job, loads))

    def _waits(self, rid: str, arrival: _Arrival) -> bool:
        """Whether a request is better off waiting for what is on its way to it."""
        self._stage_others(rid)
        if arrival.wait.over or not arrival.moving:
            return False
        return self._patience.waits(arrival.wait, self._outlook(arrival))

    def _outlook(self, arrival: _Arrival) -> Outlook:
        full, *others = self.lanes
        ticket = arrival.tickets[0]
        sizes = [lane.store.arena.slot_bytes for lane in self.lanes]
        pairs = list(zip(sizes, arrival.tickets, strict=False))
        missing = ticket.remaining * full.layout.chunk_tokens
        coming = missing + ticket.arrived * full.layout.chunk_tokens
        return Outlook(
            arrived=sum(size * ticket.arrived for size, ticket in pairs),
            remaining=sum(size * ticket.remaining for size, ticket in pairs),
            at_once=self._io_threads * sizes[0],
            tokens=coming if others else missing,
            all_tokens=coming or len(arrival.digests) * self._page_tokens,
            unknown=any(ticket.planning for ticket in arrival.tickets),
        )

    def _measure(self, rid: str) -> None:
        """Learn how fast the tiers were from a request for which all has come. While a batch was
        computed nobody looked: what counts is when it came.
        """
        arrival = self._landing_for[rid]
        tickets = arrival.tickets
        if rid not in self._staging and not any(ticket.reading for ticket in tickets):
            del self._landing_for[rid]
            sizes = [lane.store.arena.slot_bytes for lane in self.lanes]
            size = sum(size * t.came for size, t in zip(sizes, tickets, strict=False))
            self._patience.landed(arrival.wait, size, max(ticket.came_at for ticket in tickets))

    def _waits_for_twin(
        self, arrival: _Arrival, digests: Sequence[str], ends: Sequence[int], first: int
    ) -> bool:
        """Whether another request loads these pages: soon they are in the tree, for all."""
        if not ends or digests[ends[-1] - first - 1] not in self._coming:
            return False
        now = time.monotonic()
        arrival.twin_until = arrival.twin_until or now + WAIT_FOR_TWIN_S
        return now < arrival.twin_until

    def _stage_others(self, rid: str) -> None:
        """Full attention is here as far as it comes: bring up what such a prefix needs of the other
        pools.
        """
        arrival = self._staging.get(rid)
        if arrival is None or arrival.tickets[0].moving:
            return
        del self._staging[rid]
        full, *others = self.lanes
        steps = full.store.lookup(full.steps(arrival.digests, 0)[1])
        if steps:
            end = steps * full.layout.step_pages
            arrival.tickets += [lane.stage(arrival.digests, end) for lane in others]

    def _ends(self, digests: Sequence[str], first: int, end: int) -> list[int]:
        """Where a prefix can end, after page `first` and not after page `end`, of which full
        attention is here. A single rank needs the last only; several must find a common one, for
        which, beside ends of states, chunk boundaries and the steps of the last chunk do.
        """
        others = self.lanes[1:]
        last = self._longest(digests, first, end)
        if last <= first:
            return []
        if self._agreeing == 1:
            return [last]
        layout = self.lanes[0].layout
        chunk, step = layout.chunk_pages, layout.step_pages
        if any(lane.kind is Kind.STATE for lane in others):
            ends = [last]
            while len(ends) < MAX_ENDS:
                last = self._longest(digests, first, last - step)
                if last <= first:
                    break
                ends.append(last)
            return ends[::-1]
        ends = list(range(first - first % chunk + chunk, last, chunk))
        begin = (last - 1) // chunk * chunk
        ends += [*range(begin + step, last, step), last]
        return [
            end
            for end in sorted(set(ends))
            if end > first and all(lane.limit(digests, first, end) == end for lane in others)
        ]

    def _longest(self, digests: Sequence[str], first: int, end: int) -> int:
        """The last page up to `end` where what all pools need of a prefix is here."""
        while end > first:
            limit = min((lane.limit(digests, first, end) for lane in self.lanes[1:]), default=end)
            if limit == end:
                break
            end = limit
        return end

    def _source(
        self, lane: Lane, cache: Any, path: Any, transfer: Any, offload: _Offload
    ) -> tuple[Sequence[str], int, Callable[[], torch.Tensor]] | None:
        """The pages of a node's transfer, those before them that their first chunk needs included:
        digests, the first page, and a call for the slots from there on.

        Ancestors' pages of full attention are on the device while SGLang holds the node. Those in a
        window may go: they are held here until the offload is over, which SGLang counts on every
        rank alike.
        """
        page, per_chunk = self._page_tokens, lane.layout.chunk_pages
        if lane.kind is Kind.STATE:
            return transfer.keys, 0, lambda: transfer.device_indices
        node = path[-1]
        first = node.path_end // page - len(transfer.keys)
        begin = first - first % per_chunk
        if lane.kind is Kind.FULL:
            low = max(0, begin - 1)  # the page before a chunk names its parent
            before = compat.digests_between(cache, path[:-1], low, first)
            if len(before) != first - low:
                return None
            return (
                [*before, *transfer.keys],
                low,
                lambda: cache.path_device_indices(node.node_id)[low * page :],
            )
        if first * page == node.path_start:
            before = compat.digests_between(cache, path[:-1], begin, first)
            slots = compat.window_slots_between(cache, path[:-1], begin, first)
            if slots is not None and len(before) == first - begin:
                if begin < first:
                    offload.unlock = compat.hold(cache, path[:-1], begin)
                every = torch.cat([*slots, transfer.device_indices])
                return [*before, *transfer.keys], begin, lambda: every
        return transfer.keys, first, lambda: transfer.device_indices

    def _settle(self, offload: _Offload) -> None:
        """The copy of an offload is over: show it, or forget it."""
        if offload.job is None:
            return
        leases, error = offload.leases, offload.job.error
        offload.leases, offload.job = [], None
        if error is None and not self._stale_tree:
            with self.stats.timed("scheduler.commit"):
                for lease in leases:
                    lease.commit()
        else:
            if error is not None:
                log.error("lmc could not store KV: %s", error)
            for lease in leases:
                lease.abort()
            offload.kept = offload.kept and error is None
            self.stats.add("offload.lost")

    def _quiesce(self) -> None:
        """Wait for every copy that touches device pages and give back all that was held for
        requests.
        """
        self._landing.extend(self._moving.values())
        self._moving.clear()
        for job, _ in self._landing:
            job.wait()
        self._let_go()
        for rid in list(self._promised):
            self._break_promise(rid)
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for offload in self._offloads:
            if offload.job is not None:
                offload.job.wait()
            self._settle(offload)
            offload.unlock()
        self._offloads.clear()

    def _forget_arrival(self, rid: str) -> None:
        self._staging.pop(rid, None)  # what is on its way may go on: it is measured yet
        self._passed_over.discard(rid)
        if (arrival := self._arrivals.pop(rid, None)) is not None:
            arrival.close()

    def _forget_old_arrivals(self) -> None:
        """SGLang does not say when a request needs no lookup any more; the store lets its chunks go
        in time.
        """
        while self._arrivals and (rid := next(iter(self._arrivals))):
            if not all(ticket.closed for ticket in self._arrivals[rid].tickets):
                return
            self._forget_arrival(rid)
