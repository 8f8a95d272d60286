"""The second door: lmc as the storage below SGLang's HiCache, for those who stay with HiCache.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "lmc", "module_path":
        "lmc_sglang.hicache", "class_name": "LmcHiCache", "interface_v1": 1}'

HiCache owns the device, a pool of host memory and the agreement of ranks; it hands over pages of
that pool by their digests, from threads of its own, and asks from the scheduler's thread too where
it decodes for another server. A page that does not come is a miss to it, so nothing is raised here
but at start. What happens to a page is page_store.py's.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from lmc.config import Config
from lmc.keys import Key
from lmc.layout import KVLayout
from lmc.store import TieredStore
from lmc.tiers import open_tiers
from lmc.transfer import resolve

from . import compat, host_pools
from .identity import Ranks, namespace_of, ranks_of_a_machine
from .page_store import PageStore

if TYPE_CHECKING:
    from collections.abc import Sequence

OPTIONS = {"backend_name", "module_path", "class_name", "interface_v1", "file_storage_path"}
"""What SGLang itself has put into the extra config."""


class LmcHiCache(HiCacheStorage):  # type: ignore[misc]
    """See the module. Built by SGLang in every rank's scheduler process, on its main thread.

    Raises ValueError for a setting, a pool or a topology it does not serve, RuntimeError for an
    unknown SGLang.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: object = None) -> None:
        compat.check_hicache()
        _check(storage_config)
        self._settings = storage_config
        self._config = Config.from_env()
        self._config.refuse_unknown()
        self._scheduler = threading.get_ident()
        self._metrics, self._metrics_lock = StorageMetrics(), threading.Lock()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host
        self._pool = host_pools.describe(mem_pool_host, compat.server_args())

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: PoolName) -> None:
        """Only the pool that is known already: restoring KV without what belongs to it (windows,
        states, indexers, drafts) would be wrong.
        """
        if host_pool_name != PoolName.KV or host_pool is not self.mem_pool_host:
            kind = type(host_pool).__name__
            raise ValueError(host_pools.refusal(kind, f"the pool {host_pool_name}"))

    def on_host_pools_registered(self) -> None:
        """All pools are known and served: open the tiers."""
        config, pool, args = self._config, self._pool, compat.server_args()
        settings = self._settings
        if settings.is_mla_model and settings.tp_size > 1 and not config.tiers:
            raise ValueError(
                f"LMC_TIERS: with MLA on {settings.tp_size} ranks HiCache has one of them write "
                "for all, so it takes a place below RAM that all of them reach"
            )
        layout = KVLayout(pool.page_tokens, pool.page_tokens, pool.pages.page_bytes)
        rank, size = settings.tp_rank, settings.tp_size
        if settings.is_mla_model:  # the same on all ranks: one of them writes
            rank, size = 0, 1
        ranks = Ranks(rank, size, size, ranks_of_a_machine(args))
        store = TieredStore(
            layout,
            namespace_of(args, config, pool, layout, ranks),
            config.ram_bytes_of_rank(ranks.on_this_machine),
            open_tiers(config),
            io_threads=config.io_threads,
            write_queue_bytes=config.write_queue_bytes,
        )
        kernels = config.kernels if config.kernels == "torch" else "auto"
        backend = resolve(kernels, torch.device("cpu"))
        self._pages = PageStore(pool.pages, store, backend, config.stage_wait_s)
        store.warm()
        compat.listen_to_hicache(self)

    # --- what HiCache asks

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        firmly = threading.get_ident() == self._scheduler
        return self._pages.find(_decoded(keys), firmly=firmly)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        started = time.perf_counter()
        num = self._pages.load(_decoded(keys), self._page_ids(host_indices))
        self._measure("prefetch", num, started)
        return [True] * num + [False] * (len(keys) - num)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        started = time.perf_counter()
        ancestors = (extra_info.prefix_keys if extra_info else None) or ()
        before = next(iter(_decoded(ancestors[-1:])), None)
        kept = self._pages.keep(_decoded(keys), before, self._page_ids(host_indices))
        self._measure("backup", sum(kept), started)
        return kept

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        if any(transfer.name != PoolName.KV for transfer in pool_transfers or ()):
            return PoolTransferResult.empty()
        num = self.batch_exists(keys, extra_info)
        return PoolTransferResult(num, {PoolName.KV: num} if num else {}, list(range(1, num + 1)))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._of_pool(self.batch_get_v1, t, extra_info) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._of_pool(self.batch_set_v1, t, extra_info) for t in transfers}

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def clear(self) -> None:
        """Nothing stored so far is found again from here; what lasting tiers hold stays there, and
        they get nothing more from this process.
        """
        self._pages.forget()

    def get_stats(self) -> StorageMetrics:
        """What moved since the last call."""
        with self._metrics_lock:
            metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    def close(self) -> None:
        compat.stop_listening(self)
        if hasattr(self, "_pages"):
            self._pages.close()

    # --- what the hooks report

    def weights_changed(self) -> None:
        self._pages.renew()

    def tree_flushed(self) -> None:
        self._pages.flushed()

    def snapshot(self) -> dict[str, float]:
        return self._pages.snapshot()

    # --- the older interface, by values: refused at start, hence never used

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        return None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[None]:
        return [None] * len(keys)

    def set(self, key: str, *args: Any, **kwargs: Any) -> bool:
        return False

    def batch_set(self, keys: list[str], *args: Any, **kwargs: Any) -> bool:
        return False

    # --- inside

    def _page_ids(self, host_indices: torch.Tensor) -> torch.Tensor:
        page = self._pool.page_tokens
        return (host_indices[::page] // page).to("cpu", torch.int64)

    def _of_pool(
        self, batch: Any, transfer: PoolTransfer, extra_info: HiCacheStorageExtraInfo | None
    ) -> list[bool]:
        keys = transfer.keys or []
        if transfer.name != PoolName.KV or transfer.host_indices is None:
            return [False] * len(keys)
        done: list[bool] = batch(keys, transfer.host_indices, extra_info)
        return done

    def _measure(self, what: str, num_pages: int, started: float) -> None:
        """For SGLang's own metrics, where it collects them."""
        if not self._settings.enable_storage_metrics:
            return
        seconds = max(time.perf_counter() - started, 1e-9)
        num_bytes = num_pages * sum(self._pool.pages.page_bytes)
        with self._metrics_lock:
            getattr(self._metrics, f"{what}_pgs").append(num_pages)
            getattr(self._metrics, f"{what}_bandwidth").append(num_bytes / 1e9 / seconds)


def _decoded(keys: Sequence[str]) -> list[Key]:
    return [Key(bytes.fromhex(key)) for key in keys]


def _check(config: HiCacheStorageConfig) -> None:
    extra = config.extra_config or {}
    if unknown := sorted(set(extra) - OPTIONS):
        raise ValueError(f"LmcHiCache takes no such options, settings are LMC_*: {unknown}")
    if not extra.get("interface_v1"):
        raise ValueError(
            'LmcHiCache needs "interface_v1": 1 in --hicache-storage-backend-extra-config'
        )
    if config.attn_cp_size > 1 or config.dcp_size > 1:
        raise ValueError(
            f"lmc does not serve context parallelism under HiCache "
            f"(attn_cp_size={config.attn_cp_size}, dcp_size={config.dcp_size})"
        )
