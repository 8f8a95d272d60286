"""lmc's counters where vLLM shows its own: the periodic log line and Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

EVENTS = "vllm:lmc_events"
STATE = "vllm:lmc_state"
_IN_THE_LOG = ("tokens.loaded", "ram.stored", "load.failed", "store.failed")


@dataclass
class LmcStats(KVConnectorStats):  # type: ignore[misc]
    """What happened since the last report ("counts") and how full the store is ("gauges")."""

    @classmethod
    def of(cls, counts: Mapping[str, float], gauges: Mapping[str, float]) -> LmcStats:
        return cls(data={"counts": dict(counts), "gauges": dict(gauges)})

    def reset(self) -> None:
        self.data: dict[str, Any] = {"counts": {}, "gauges": {}}

    def aggregate(self, other: KVConnectorStats) -> LmcStats:
        counts = dict(self.data["counts"])
        for name, n in other.data["counts"].items():
            counts[name] = counts.get(name, 0) + n
        return LmcStats.of(counts, self.data["gauges"] | other.data["gauges"])

    def reduce(self) -> dict[str, int | float]:
        counts, gauges = self.data["counts"], self.data["gauges"]
        shown = {name: n for name, n in counts.items() if name in _IN_THE_LOG or "miss" in name}
        return shown | {name: gauges[name] for name in ("ram.free_slots",) if name in gauges}

    def is_empty(self) -> bool:
        return not self.data.get("counts")


class LmcPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:lmc_events_total{event="disk.miss.checksum"}`,
    `vllm:lmc_state{of="ram.free_slots"}`.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._events = metric_types[Counter](
            name=EVENTS,
            documentation="What lmc counted, by event; seconds where the name says so.",
            labelnames=[*labelnames, "event"],
        )
        self._state = metric_types[Gauge](
            name=STATE,
            documentation="How full lmc's store is.",
            labelnames=[*labelnames, "of"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, n in transfer_stats_data["counts"].items():
            self._events.labels(*engine, name).inc(n)
        for name, n in transfer_stats_data["gauges"].items():
            self._state.labels(*engine, name).set(n)
