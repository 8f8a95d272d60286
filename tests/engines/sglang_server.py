"""One real SGLang server in a process group of its own, and the few calls that tests and the demo
make to it.

Only the standard library, so that a client costs the two cores nothing while the server works.
Whoever starts a server stops it: `with Server(...)` ends the whole process group, also after
Ctrl-C or a failed start. The time to first token is taken here, from sending the request to the
first streamed token.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

LAUNCH = ("-m", "sglang.launch_server")
CPU_FLAGS = (
    *("--device", "cpu", "--dtype", "float32"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none", "--random-seed", "1"),
    *("--skip-server-warmup", "--enable-cache-report"),
)
CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    # Threads that spin at barriers make a prefill four times slower where others use the cores.
    "OMP_WAIT_POLICY": "passive",
}
READY_S, REQUEST_S, STOP_S = 300.0, 300.0, 60.0
PR_SET_PDEATHSIG = 1


class ServerError(Exception):
    """The server did not do what was asked; the text says what happened and what to do."""


@dataclass(frozen=True, slots=True)
class Answer:
    prompt_tokens: int
    cached_tokens: int
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ttft_s: float


class Server:
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
        self.port = free_port() if port is None else port
        check_port(self.port)
        self.log = log
        command = [sys.executable, *launch, "--model-path", str(model), "--port", str(self.port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *CPU_FLAGS, *flags],
                env=server_environment(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/server_info", timeout_s=30.0)[0] == 200:
                    return
            time.sleep(0.5)
        raise ServerError(f"the server was not ready after {READY_S:.0f} s; {self.log_tail()}")

    def stop(self) -> None:
        """SGLang's graceful stop; what is left of the group after that is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        with contextlib.closing(connection):
            start = time.perf_counter()
            reply = self.send(connection, "POST", "/generate", body)
            first_s = None
            for event in events(reply):
                if "error" in event:
                    raise ServerError(f"the request failed: {event['error']}")
                reason = event["meta_info"].get("finish_reason") or {}
                if reason.get("type") == "abort":
                    raise ServerError(f"the request failed: {reason}")
                first_s = first_s or time.perf_counter() - start
                yield first_s, event
        if first_s is None:
            raise ServerError(
                f"the server ended the answer before its first token; {self.log_tail()}"
            )

    def chat(self, messages: Sequence[Mapping[str, str]], num_tokens: int) -> dict[str, Any]:
        body = {"model": "default", "messages": list(messages), "temperature": 0}
        return self.call("POST", "/v1/chat/completions", body | {"max_tokens": num_tokens})

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

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        status, text = self.request(method, path, body)
        if status != 200:
            raise ServerError(f"{method} {path} was answered {status}: {text[:400].decode()}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def request(
        self, method: str, path: str, body: object = None, timeout_s: float = REQUEST_S
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            reply = self.send(connection, method, path, body)
            return reply.status, reply.read()

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            return connection.getresponse()
        except OSError:
            self.check_alive()
            raise

    def check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"the server died (exit code {code}); {self.log_tail()}")

    def log_tail(self, num_lines: int = 25) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-num_lines:]
        return f"the end of its log, {self.log}:\n  " + "\n  ".join(lines)


def server_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, without the LMC_* settings of the shell, and with GPUs hidden: this is a CPU."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LMC_")}
    return kept | CPU_ENVIRONMENT | dict(extra)


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    if reply.status != 200:
        raise ServerError(f"the request was answered {reply.status}: {reply.read(400).decode()}")
    for line in reply:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        if data:
            yield json.loads(data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"port {port} cannot be used ({error}): "
                f"stop the program that listens there, or name another with --port"
            ) from error


def die_with_parent() -> None:
    """The kernel stops the server should this process be killed before it can."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
