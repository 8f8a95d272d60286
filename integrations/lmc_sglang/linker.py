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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.utils import get_storage_hash_str

from lmc.config import Config
from lmc.keys import Key
from lmc.layout import KVLayout
from lmc.store import Ticket, TieredStore
from lmc.tiers import open_tiers
from lmc.tiers.ram import Chunk, ReadLease, Span, WriteLease
from lmc.transfer import Job, Piece, Transfer, copier_of, resolve

from . import compat, pools
from .identity import Ranks, namespace_of
from .layers import LayerCounter

log = logging.getLogger("lmc")

CLOSE_DRAIN_S = 60.0


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


@dataclass(slots=True)
class _Arrival:
    """A request that may still be looked up."""

    ticket: Ticket
    waited: bool = False


@dataclass(slots=True)
class _Load:
    """Pages of one request on their way to the device: promised (pinned), then queued, then
    moving.
    """

    lease: ReadLease
    first_page: int
    page_ids: torch.Tensor | None = None
    pieces: list[Piece] = field(default_factory=list)


@dataclass(slots=True)
class _Offload:
    """One node on its way into RAM; `kept` is what SGLang is told when its turn comes."""

    kept: bool
    job: Job | None = None
    lease: WriteLease | None = None


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
        ranks = Ranks.of(server_args, params)
        pool = pools.describe(params, components)
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: params.token_to_kv_pool_allocator.get_kvcache()}
        self.layer_done_counter = LayerCounter(pool.num_layers)
        self._layout = KVLayout(params.page_size, config.chunk_tokens, pool.pages.page_bytes)
        self._ranks = ranks
        self._stage_wait_s = config.stage_wait_s
        self._pages = pool.pages
        device = pool.pages.device
        self._copier = copier_of(
            resolve(config.kernels, device, copy=config.gpu_copy, blocks=config.gpu_blocks),
            lambda: compat.engine_streams(device, self.forward_stream),
        )
        tiers = open_tiers(config)
        self._store = TieredStore(
            self._layout,
            namespace_of(server_args, config, pool, self._layout, ranks),
            config.ram_bytes_of_rank(ranks.on_this_machine),
            tiers,
            io_threads=config.io_threads,
            write_queue_bytes=config.write_queue_bytes,
        )
        self._copier.pin(self._store.arena.slices)
        self._device_pages = 0  # of the match that is under way
        self._node: tuple[Any, int] | None = None  # whose offload is under way
        self._wait_left_s = self._stage_wait_s  # of this scheduling pass
        self._arrivals: dict[str, _Arrival] = {}  # in order of arrival
        self._promised: dict[str, _Load] = {}  # answered in this pass, not yet asked for
        self._queued: dict[str, _Load] = {}
        self._moving: dict[int, tuple[Job, list[_Load]]] = {}  # by counter index
        self._landing: list[tuple[Job, list[_Load]]] = []  # SGLang has been told of them
        self._offloads: deque[_Offload] = deque()
        self._tree_used = False  # since the last flush
        self._stale_tree = False  # the device holds KV of weights that are no more
        get_storage_hash_str(
            RadixKey([0]), None, page_size=1
        )  # builds SGLang's hash now, not in a request
        self._store.warm()
        compat.listen(self)

    # --- what the hooks report

    def match_begins(self, device_pages: int) -> None:
        self._device_pages = device_pages
        self._tree_used = True

    def offload_begins(self, cache: Any, node_id: int) -> None:
        self._node = (cache, node_id)
        self._tree_used = True

    def request_arrived(self, req: Any) -> None:
        """Start bringing up the request's prefix; its chain is in use from now on, the device's
        part of it too.
        """
        with self._store.stats.timed("scheduler.arrival"):
            self._forget_arrival(req.rid)
            self._forget_old_arrivals()
            page = self._layout.page_tokens
            tokens = req.origin_input_ids
            if req.output_ids:  # retracted: what it had generated comes back too
                tokens = tokens + req.output_ids
            num_tokens = (len(tokens) - 1) // page * page
            if num_tokens > 0:
                key = RadixKey(tokens, req.extra_key, limit=num_tokens, cache_salt=req.cache_salt)
                digests = get_storage_hash_str(key, None, page_size=page)
                ticket = self._store.stage(self._steps(digests, 0)[1])
                self._arrivals[req.rid] = _Arrival(ticket)

    def request_aborted(self, rid: str) -> None:
        self._forget_arrival(rid)
        self._break_promise(rid)

    def weights_changed(self) -> None:
        """Nothing stored is found again; the tree's KV is not kept until it was flushed."""
        self._store.renew()
        self._arrivals.clear()
        for rid in list(self._promised):
            self._break_promise(rid)
        self._stale_tree = self._stale_tree or self._tree_used

    def snapshot(self) -> dict[str, float]:
        return self._store.snapshot()

    # --- from store to device

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        started, waited = time.perf_counter(), 0.0
        store, per_step = self._store, self._layout.step_pages
        start, keys = self._steps(transfers[0].keys, self._device_pages)
        store.poll()
        if (arrival := self._arrivals.get(rid)) is not None:
            waited = self._wait_for(arrival)
        self._break_promise(rid)
        lease = store.acquire(keys, start)
        num_pages = (start + lease.steps) * per_step - self._device_pages if lease else 0
        if lease:
            self._promised[rid] = _Load(lease, self._device_pages)
        store.stats.spent("scheduler.lookup", time.perf_counter() - started - waited)
        return self._lengths(num_pages)

    def load(self, rid: str, transfers: list[Any]) -> bool:
        with self._store.stats.timed("scheduler.load"):
            self.cancel_queued_load(rid)
            load = self._promised.pop(rid, None)
            if load is None:
                return False
            page = self._layout.page_tokens
            page_ids = transfers[0].device_indices[::page] // page
            load.page_ids = page_ids.to("cpu", torch.int64)
            load.pieces.extend(self._pieces(load.lease.spans, load.first_page, len(page_ids)))
            self._queued[rid] = load
            self._forget_arrival(rid)
            return True

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        with self._store.stats.timed("scheduler.start_load"):
            loads = list(self._queued.values())
            self._queued.clear()
            page_ids = torch.cat([load.page_ids for load in loads if load.page_ids is not None])
            pieces = [piece for load in loads for piece in load.pieces]
            job = self._copier.load([Transfer(self._pages, page_ids, pieces)], layers=True)
            index = self.layer_done_counter.begin(job)
            self._moving[index] = (job, loads)
            self._store.stats.add("pages.loaded", len(page_ids))
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
            load.lease.release()
        return load is not None

    # --- from device to store

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Always accepted: what ranks count must not depend on what fits here."""
        with self._store.stats.timed("scheduler.offload"):
            node, self._node = self._node, None
            if self._stale_tree or node is None:
                self._offloads.append(_Offload(kept=True))
                return True
            cache, node_id = node
            path = cache.tree_core.collect_path_info([node_id])[0]
            first, chunks = self._chunks(cache.tree_core, path, transfers[0].keys)
            lease = self._store.reserve(chunks)
            kept = len(lease) == len(chunks) or self._covered(chunks, lease)
            if not lease:
                self._offloads.append(_Offload(kept))
                return True
            slots = cache.path_device_indices(node_id)[first * self._layout.chunk_tokens :]
            page_ids, pieces = self._sources(slots, chunks, lease)
            job = self._copier.store([Transfer(self._pages, page_ids, pieces)])
            self._offloads.append(_Offload(kept, job, lease))
            return True

    def num_completed_offloads(self) -> int:
        """SGLang asks once a scheduler step, before it looks anything up: a new scheduling pass."""
        with self._store.stats.timed("scheduler.step"):
            self._wait_left_s = self._stage_wait_s
            for rid in list(self._promised):
                self._break_promise(rid)
            self._let_go()
            self._store.poll()
            done = 0
            for offload in self._offloads:
                if offload.job is not None and not offload.job.done():
                    break
                self._settle(offload)
                done += 1
            return done

    def pop_completed_offload(self) -> bool:
        return self._offloads.popleft().kept

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
        self._store.close(CLOSE_DRAIN_S)

    # --- inside

    def _break_promise(self, rid: str) -> None:
        if (load := self._promised.pop(rid, None)) is not None:
            load.lease.release()

    def _let_go(self) -> None:
        """Chunks of loads that are over need not stay."""
        landing, self._landing = self._landing, []
        for job, loads in landing:
            if job.done():
                for load in loads:
                    load.lease.release()
            else:
                self._landing.append((job, loads))

    def _steps(self, digests: Sequence[str], first_page: int) -> tuple[int, StepKeys]:
        """Absolute step of the first key, and keys of the steps that end in these pages."""
        per_step = self._layout.step_pages
        step = first_page // per_step
        return step, StepKeys(digests, (step + 1) * per_step - 1 - first_page, per_step)

    def _wait_for(self, arrival: _Arrival) -> float:
        """Wait for what is on its way up, once a request and within this pass's budget; seconds it
        took.
        """
        if arrival.waited or not arrival.ticket.moving or self._wait_left_s <= 0:
            return 0.0
        arrival.waited = True
        started = time.perf_counter()
        self._store.settle(arrival.ticket, self._wait_left_s)
        waited = time.perf_counter() - started
        self._wait_left_s -= waited
        self._store.stats.spent("scheduler.waited", waited)
        return waited

    def _lengths(self, num_pages: int) -> list[int]:
        """Restorable lengths in pages. A single rank needs the longest only; several must find a
        common one, for which chunk boundaries do beside the steps of the last chunk.
        """
        if not num_pages:
            return []
        if self._ranks.agreeing == 1:
            return [num_pages]
        begin = self._device_pages
        chunk, step = self._layout.chunk_pages, self._layout.step_pages
        ends = set(range(begin - begin % chunk + chunk, begin + num_pages, chunk))
        last = (begin + num_pages - 1) // chunk * chunk
        ends.update(range(last + step, begin + num_pages, step), [begin + num_pages])
        return sorted(end - begin for end in ends if end > begin)

    def _pieces(self, spans: Sequence[Span], first_page: int, num_pages: int) -> Iterator[Piece]:
        """Where in RAM the `num_pages` pages from absolute page `first_page` on lie."""
        per_step, chunk = self._layout.step_pages, self._layout.chunk_pages
        at, end = first_page, first_page + num_pages
        for span in spans:
            begin = at - at % chunk
            stop = min(end, begin + (span.first + span.steps) * per_step)
            yield Piece(
                self._store.arena.address(span.slot), span.total * per_step, at - begin, stop - at
            )
            at = stop
            if at == end:
                return

    def _chunks(self, tree: Any, path: Any, digests: Sequence[str]) -> tuple[int, list[Chunk]]:
        """The chunks and the tail that a node completes, and the absolute number of the first.

        A chunk begun in ancestor nodes is named whole; its first steps' digests are the ancestors'.
        """
        layout = self._layout
        first = path[-1].path_start // layout.page_tokens
        begin = first - first % layout.chunk_pages
        low = max(0, begin - 1)  # the page before a chunk names its parent
        before = _digests_between(tree, path[:-1], layout.page_tokens, low, first)
        if len(before) != first - low:  # a node without digests: no names, hence nothing to keep
            return 0, []
        digests = [*before, *digests]
        parent = Key(bytes.fromhex(digests[0])) if begin else None
        keys = self._steps(digests[begin - low :], begin)[1][:]
        chunks: list[Chunk] = []
        for i in range(0, len(keys), layout.chunk_steps):
            chunks.append(Chunk(tuple(keys[i : i + layout.chunk_steps]), parent))
            parent = chunks[-1].key
        return begin // layout.chunk_pages, chunks

    def _sources(
        self, slots: torch.Tensor, chunks: Sequence[Chunk], lease: WriteLease
    ) -> tuple[torch.Tensor, list[Piece]]:
        """Pages to gather, and where in RAM they go; `slots` begin with the first chunk."""
        layout, address = self._layout, self._store.arena.address
        page_ids = (slots[:: layout.page_tokens] // layout.page_tokens).to("cpu", torch.int64)
        sizes = [len(chunk.keys) * layout.step_pages for chunk in lease.chunks]
        if len(lease) < len(chunks):
            number = {id(chunk): n for n, chunk in enumerate(chunks)}
            begins = [number[id(chunk)] * layout.chunk_pages for chunk in lease.chunks]
            ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
            page_ids = torch.cat([page_ids[b:e] for b, e in zip(begins, ends, strict=True)])
        slots_and_sizes = zip(lease.slots, sizes, strict=True)
        return page_ids[: sum(sizes)], [Piece(address(s), n, 0, n) for s, n in slots_and_sizes]

    def _covered(self, chunks: Sequence[Chunk], lease: WriteLease) -> bool:
        """Whether what the lease does not hold is in RAM already."""
        taken = set(map(id, lease.chunks))
        return all(id(chunk) in taken or chunk.key in self._store.ram for chunk in chunks)

    def _settle(self, offload: _Offload) -> None:
        """The copy of an offload is over: show it, or forget it."""
        if offload.lease is None or offload.job is None:
            return
        lease, error = offload.lease, offload.job.error
        offload.lease = offload.job = None
        if error is None and not self._stale_tree:
            with self._store.stats.timed("scheduler.commit"):
                lease.commit()
        else:
            if error is not None:
                log.error("lmc could not store KV: %s", error)
            lease.abort()
            offload.kept = offload.kept and error is None
            self._store.stats.add("offload.lost")

    def _quiesce(self) -> None:
        """Wait for every copy that touches device pages and give back all that was held for
        requests.
        """
        self._landing.extend(self._moving.values())
        self._moving.clear()
        for job, _ in self._landing:
            job.wait()
        self._let_go()
        for held in (self._promised, self._queued):
            for load in held.values():
                load.lease.release()
            held.clear()
        for offload in self._offloads:
            if offload.job is not None:
                offload.job.wait()
            self._settle(offload)
        self._offloads.clear()

    def _forget_arrival(self, rid: str) -> None:
        if (arrival := self._arrivals.pop(rid, None)) is not None:
            arrival.ticket.close()

    def _forget_old_arrivals(self) -> None:
        """SGLang does not say when a request needs no lookup any more; the store lets its chunks go
        in time.
        """
        while self._arrivals and (rid := next(iter(self._arrivals))):
            if not self._arrivals[rid].ticket.closed:
                return
            del self._arrivals[rid]


def _digests_between(tree: Any, ancestors: Any, page_tokens: int, low: int, high: int) -> list[str]:
    """Digests of the absolute pages `low` to `high`, which lie in `ancestors` (root first)."""
    digests: list[str] = []
    for info in reversed(ancestors):
        if info.path_end // page_tokens <= low or high <= low:
            break
        digests = [*tree.get_hash_values(info.node_id), *digests]
    return digests[len(digests) - (high - low) :] if high > low else []
