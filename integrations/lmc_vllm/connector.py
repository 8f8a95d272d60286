"""The connector vLLM builds: one object beside the scheduler, one in every worker.

Every call is handed to the side it belongs to; what vLLM asks for and lmc does not use (layer-wise
hooks, delayed frees) keeps its default. Loads are asynchronous: a request waits for its KV while
others run, and nothing a load writes is read before vLLM hears that all of it is there.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmc.config import Config

from . import compat
from .groups import groups_of
from .metrics import LmcPromMetrics, LmcStats
from .scheduler import SchedulerSide
from .wire import Loaded, Registered, Report, Step
from .worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

log = logging.getLogger("lmc")

EXTRA = ("ram_bytes", "kv_load_failure_policy")
POLICIES = ("recompute", "fail")


class LMCConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module. `kv_connector_extra_config` may hold `ram_bytes`, RAM for one engine, which
    goes before LMC_RAM_GB, and `kv_load_failure_policy`: "recompute" unless "fail" is said here,
    for vLLM's own field is "fail" where nobody said anything. Raises ValueError for a setting, a
    model or a topology lmc does not serve, RuntimeError for an unknown vLLM.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        compat.check()
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = _config_of(vllm_config)
        _refuse_topologies(vllm_config)
        self._kv_transfer_config.kv_load_failure_policy = _policy_of(vllm_config)
        groups = groups_of(kv_cache_config, self._config.chunk_tokens)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            compat.watch_calls(_weights_changed, _adapter_added)
            self.scheduler = SchedulerSide(vllm_config, kv_cache_config, groups, self._config)
        else:
            compat.watch_adapters(_adapter_loading)
            self.worker = WorkerSide(vllm_config, kv_cache_config, groups)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: what is not kept is computed again

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Head-major on GPUs, as vLLM's own offloading asks: a block of a layer is one run of
        bytes. A CPU has one layout only.
        """
        from vllm.platforms import current_platform

        return None if current_platform.is_cpu() else "LBHNC"

    # --- the scheduler's side

    def _beside_scheduler(self) -> SchedulerSide:
        assert self.scheduler is not None
        return self.scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._beside_scheduler().kv_cache_manager = kv_cache_manager

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], Registered]
    ) -> None:
        if all(isinstance(told, Registered) for told in metadata.values()):
            self._beside_scheduler().connect(metadata)
        else:  # MultiConnector hands on another connector's: ours comes with the first report
            log.info("lmc starts with the first step")

    def on_new_request(self, request: Any) -> None:
        self._beside_scheduler().arrived(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._beside_scheduler().match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids = blocks.get_block_ids() if num_external_tokens else ()
        self._beside_scheduler().allocated(request, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        return self._beside_scheduler().step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._beside_scheduler().update(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._beside_scheduler().finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._beside_scheduler().busy

    def reset_cache(self) -> bool:
        return self._beside_scheduler().reset()

    def get_kv_connector_stats(self) -> LmcStats | None:
        if self.scheduler is None or (news := self.scheduler.news()) is None:
            return None
        return LmcStats.of(*news)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LmcStats:
        return LmcStats(data=data) if data else LmcStats.of({}, {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> LmcPromMetrics:
        return LmcPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- the worker's side

    def _in_worker(self) -> WorkerSide:
        assert self.worker is not None
        return self.worker

    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        replicas = int(getattr(self._kv_cache_config, "kv_tp_replicas", 1))
        self._in_worker().register(kv_caches, _rank(), self._config, replicas)

    def get_handshake_metadata(self) -> Registered:
        return self._in_worker().registered()

    def handle_preemptions(self, kv_connector_metadata: Step) -> None:
        self._in_worker().before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._in_worker().start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # loads are over before their request is scheduled

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass  # whole blocks are copied after the step

    def wait_for_save(self) -> None:
        self._in_worker().start_stores(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        over, failed = self._in_worker().take_loads()
        return KVConnectorTransferResults(finished_recving=over, failed_recving=failed)

    def build_connector_worker_meta(self) -> Report | None:
        return self._in_worker().take_report()

    # --- both

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.close()
        if self.scheduler is not None:
            self.scheduler.close()


def _config_of(vllm_config: Any) -> Config:
    """The LMC_* settings, with what was given to vLLM before them."""
    config = Config.from_env()
    config.refuse_unknown()
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if unknown := sorted(extra.keys() - set(EXTRA)):
        raise ValueError(
            f"kv_connector_extra_config of LMCConnector: {unknown[0]!r} is unknown; choices: "
            f"{', '.join(EXTRA)}. Settings are LMC_*"
        )
    if (ram_bytes := extra.get("ram_bytes")) is None:
        return config
    if not isinstance(ram_bytes, int) or ram_bytes < 1:
        raise ValueError(
            f"kv_connector_extra_config: ram_bytes={ram_bytes!r} must be a positive whole number"
        )
    parallel = vllm_config.parallel_config
    replicas = max(1, int(getattr(parallel, "data_parallel_size_local", 1)))
    return dataclasses.replace(config, ram_bytes=ram_bytes * replicas)


def _policy_of(vllm_config: Any) -> str:
    """What vLLM does with a request whose load failed; it asks once the connector stands."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    policy: str = extra.get("kv_load_failure_policy", POLICIES[0])
    if policy not in POLICIES:
        raise ValueError(
            f"kv_connector_extra_config: kv_load_failure_policy={policy!r}; choices: "
            f"{', '.join(POLICIES)}"
        )
    return policy


def _parts_of(connector: Any) -> Iterator[LMCConnector]:
    """Those of lmc among what an engine's or a worker's connector is made of."""
    if isinstance(connector, LMCConnector):
        yield connector
    for part in getattr(connector, "sub_connectors", ()):
        yield from _parts_of(part)


def _weights_changed(connector: Any) -> None:
    for part in _parts_of(connector):
        part.reset_cache()


def _adapter_added(connector: Any, call: Callable[..., Any]) -> None:
    """Ask the workers what they loaded: no step may follow for long that reports it."""
    loaded = [load for loads in call(_take_adapters) for load in loads]
    for part in _parts_of(connector):
        part._beside_scheduler().adapters_loaded(loaded)


def _take_adapters(worker: Any) -> list[Loaded]:
    """Called in each worker."""
    parts = _parts_of(compat.connector_in_worker())
    return [load for part in parts for load in part._in_worker().take_adapters()]


@contextmanager
def _adapter_loading(lora: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for part in _parts_of(compat.connector_in_worker()):
            stack.enter_context(part._in_worker().loading(lora))
        yield


def _refuse_topologies(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise ValueError(f"lmc does not serve context parallelism ({name}={size})")


def _rank() -> tuple[int, int]:
    """Pipeline and tensor rank of this worker."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_pp_group().rank_in_group, get_tp_group().rank_in_group
