"""A real vLLM server, and the few calls that tests and the demo make to it.

Emptying its cache needs vLLM's development mode, which is therefore always on. A stop waits: by
default vLLM kills its processes at once, and what lmc has not written yet is lost.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.server import STOP_S, Answer, Server, ServerError, free_port

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

LAUNCH = (str(Path(sys.executable).with_name("vllm")), "serve")
CPU_FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--seed", "1"),
    *("--served-model-name", "default", "--enable-prompt-tokens-details"),
    *("--shutdown-timeout", str(int(STOP_S) // 2)),
)
CPU_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The default pins all threads to one of two cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}

COUNTER = re.compile(r'^vllm:lmc_(?:events_total|state){.*\b(?:event|of)="([^"]+)".*} (\S+)$', re.M)


class VllmServer(Server):
    ready_path = "/health"

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
        command = [sys.executable, *launch, str(model), "--host", "127.0.0.1", "--port", str(port)]
        super().__init__(
            [*command, *CPU_FLAGS, *flags],
            log,
            environment=CPU_ENVIRONMENT | dict(environment or {}),
            port=port,
        )

    def generate(
        self, prompt: Sequence[int], num_tokens: int, *, logprobs: bool = False, **options: Any
    ) -> Answer:
        """Greedy and streamed."""
        if logprobs:
            options["logprobs"] = 0  # of the token taken, and of no other
        ttft_s, usage, ids, values, text = None, None, [], [], ""
        for seconds, event in self.stream(prompt, num_tokens, **options):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                ids += choice["token_ids"] or []
                text += choice["text"]
                values += (choice.get("logprobs") or {}).get("token_logprobs") or []
                if ids and ttft_s is None:
                    ttft_s = seconds
        if usage is None or ttft_s is None:
            raise ServerError(f"the server ended the answer before its end; {self.log_tail()}")
        return Answer(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            output_ids=tuple(ids),
            logprobs=tuple(values),
            text=text,
            ttft_s=ttft_s,
        )

    def stream(
        self, prompt: Sequence[int], num_tokens: int, **options: Any
    ) -> Generator[tuple[float, dict[str, Any]]]:
        """What came, and after how many seconds; closing it aborts the request."""
        body = {"model": "default", "prompt": list(prompt), "max_tokens": num_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
        body |= {"stream_options": {"include_usage": True}, **options}
        for seconds, event in self.events("/v1/completions", body):
            if "error" in event:
                raise ServerError(f"the request failed: {event['error']}")
            reasons = {choice.get("finish_reason") for choice in event["choices"]}
            if reasons & {"abort", "error"}:
                raise ServerError(f"the request failed: {event}")
            yield seconds, event

    def flush(self, timeout_s: float = 30.0) -> None:
        """Empties the engine's own cache, once no block is held any more."""
        deadline = time.monotonic() + timeout_s
        while not self.call("POST", "/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise ServerError("the server did not flush its cache: blocks are still held")
            time.sleep(0.05)

    def info(self) -> dict[str, Any]:
        """vLLM's configuration, as `/server_info` prints it."""
        config: dict[str, Any] = self.call("GET", "/server_info?config_format=json")["vllm_config"]
        return config

    def lmc(self) -> dict[str, float] | None:
        """lmc's counters as of about a second before the last step, None where there are none."""
        status, text = self.request("GET", "/metrics")
        found = COUNTER.findall(text.decode()) if status == 200 else []
        return {name: float(value) for name, value in found} or None
