"""A real SGLang server, and the few calls that tests and the demo make to it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tests.engines.server import Answer, Server, ServerError, free_port

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

LAUNCH = ("-m", "sglang.launch_server")
CPU_FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none", "--random-seed", "1"),
    *("--skip-server-warmup", "--enable-cache-report"),
)


class SglangServer(Server):
    ready_path = "/server_info"

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        launch: Sequence[str] = LAUNCH,
        port: int | None = None,
    ) -> None:
        port = free_port() if port is None else port
        command = [sys.executable, *launch, "--model-path", str(model), "--port", str(port)]
        super().__init__(
            [*command, *CPU_FLAGS, *flags], log, environment=environment or {}, port=port
        )

    def generate(
        self, prompt: Sequence[int], num_tokens: int, *, logprobs: bool = False, **options: Any
    ) -> Answer:
        """Greedy and streamed."""
        *_, (first_s, last) = self.stream(prompt, num_tokens, return_logprob=logprobs, **options)
        meta = last["meta_info"]
        return Answer(
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            output_ids=tuple(last["output_ids"]),
            logprobs=tuple(entry[0] for entry in meta.get("output_token_logprobs") or ()),
            text=last.get("text") or "",
            ttft_s=first_s,
        )

    def stream(
        self, prompt: Sequence[int], num_tokens: int, **options: Any
    ) -> Generator[tuple[float, dict[str, Any]]]:
        """Seconds to the first token and the answer so far; closing it aborts the request."""
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True, **options}
        first_s = None
        for seconds, event in self.events("/generate", body):
            if "error" in event:
                raise ServerError(f"the request failed: {event['error']}")
            reason = event["meta_info"].get("finish_reason") or {}
            if reason.get("type") == "abort":
                raise ServerError(f"the request failed: {reason}")
            first_s = first_s or seconds
            yield first_s, event
        if first_s is None:
            raise ServerError(
                f"the server ended the answer before its first token; {self.log_tail()}"
            )

    def flush(self) -> None:
        """Empties the engine's own cache, once the engine is idle."""
        status, text = self.request("POST", "/flush_cache?timeout=30")
        if status != 200:
            raise ServerError(
                f"the server did not flush its cache: {text.decode(errors='replace')}"
            )

    def info(self) -> dict[str, Any]:
        return self.call("GET", "/server_info")

    def lmc(self) -> dict[str, Any] | None:
        """lmc's counters on the first rank, None where lmc is not in this server."""
        state: dict[str, Any] | None = self.info()["internal_states"][0].get("lmc")
        return state

    def drain(self, timeout_s: float = 120.0) -> None:
        """Waits until lmc has written all it holds to its lower tiers."""
        deadline = time.monotonic() + timeout_s
        while (state := self.lmc()) is None or state["spill_queue_bytes"]:
            if state is None:
                raise ServerError(
                    f"lmc is not in this server, though it was asked for; {self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"lmc still has {state['spill_queue_bytes']} bytes to write")
            time.sleep(0.1)
