"""What differs between the engines that the demo shows; everything else is in demo.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RAM_GB = 2


class Sglang:
    name, title = "sglang", "SGLang"
    prompt_tokens: ClassVar[int | None] = None
    """Of the demo's prompt; None leaves it as long as its text is."""

    def __init__(self, page_size: int | None) -> None:
        self.page_size = page_size

    def start(
        self, model: Path, log: Path, *, lmc: Mapping[str, str] | None, port: int | None
    ) -> SglangServer:
        """`lmc` holds its settings, None starts the server without it."""
        flags = ["--max-total-tokens", "8192", "--max-running-requests", "4"]
        if self.page_size is not None:
            flags += ["--page-size", str(self.page_size)]
        settings = {} if lmc is None else {"LMC_ENABLE": "1", "LMC_RAM_GB": str(RAM_GB), **lmc}
        return SglangServer(model, log, flags=flags, environment=settings, port=port)

    def read_settings(self, server: SglangServer) -> str:
        """The engine's version. lmc chose the page size where no option did: the server without
        lmc gets the same.
        """
        info = server.info()
        self.page_size = info["page_size"]
        return str(info["version"])

    def drain(self, server: SglangServer) -> None:
        """Waits until all that lmc holds is on disk."""
        server.drain()

    def counters(self, server: SglangServer) -> dict[str, float]:
        return server.lmc() or {}

    def own_time(self, counters: Mapping[str, float]) -> str:
        parts = ("arrival", "lookup", "load", "start_load", "offload", "commit")
        spent_s = sum(counters.get(f"scheduler.{part}.seconds", 0.0) for part in parts)
        request_ms = 1e3 * spent_s / counters["scheduler.arrival.calls"]
        step_us = 1e6 * counters["scheduler.step.seconds"] / counters["scheduler.step.calls"]
        return f"{request_ms:.2f} ms a request, {step_us:.0f} us an idle scheduling step"


class Vllm:
    name, title = "vllm", "vLLM"
    prompt_tokens: ClassVar[int | None] = 2048  # 16 of vLLM's blocks on a CPU

    def __init__(self, page_size: int | None) -> None:
        self.page_size = page_size

    def start(
        self, model: Path, log: Path, *, lmc: Mapping[str, str] | None, port: int | None
    ) -> VllmServer:
        flags = ["--max-model-len", "4096", "--max-num-batched-tokens", "4096"]
        flags += ["--kv-cache-memory-bytes", "512M", "--max-num-seqs", "4"]
        if self.page_size is not None:
            flags += ["--block-size", str(self.page_size)]
        if lmc is not None:
            flags += ["--kv-offloading-backend", "lmc", "--kv-offloading-size", str(RAM_GB)]
        return VllmServer(model, log, flags=flags, environment=lmc, port=port)

    def read_settings(self, server: VllmServer) -> str:
        self.page_size = server.info()["cache_config"]["block_size"]
        return str(server.call("GET", "/version")["version"])

    def drain(self, server: VllmServer) -> None:
        """Nothing to do: a stop of the server waits for what is not on disk yet."""

    def counters(self, server: VllmServer) -> dict[str, float]:
        return server.lmc() or {}

    def own_time(self, counters: Mapping[str, float]) -> str:
        spent_s = sum(
            spent
            for name, spent in counters.items()
            if name.startswith("scheduler.") and name.endswith(".seconds")
        )
        request_ms = 1e3 * spent_s / counters["scheduler.arrival.calls"]
        return f"{request_ms:.2f} ms a request, all its scheduling steps included"


Engine = Sglang | Vllm
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Sglang, Vllm)}
