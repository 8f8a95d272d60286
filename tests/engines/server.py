"""One real server of an engine in a process group of its own: what tests and the demo do with any
engine's. sglang_server.py and vllm_server.py say how each is started and asked.

Only the standard library, so that a client costs the two cores nothing while the server works.
Whoever starts a server stops it: `with SglangServer(...)` ends the whole process group, also after
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
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

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
    ready_path: ClassVar[str]
    """Answered with 200 from when the server takes requests."""

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str], port: int
    ) -> None:
        check_port(port)
        self.port = port
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=server_environment(environment),
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
                if self.request("GET", self.ready_path, timeout_s=30.0)[0] == 200:
                    return
            time.sleep(0.5)
        raise ServerError(f"the server was not ready after {READY_S:.0f} s; {self.log_tail()}")

    def stop(self) -> None:
        """The engine's graceful stop; what is left of the group after that is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def chat(self, messages: Sequence[Mapping[str, str]], num_tokens: int) -> dict[str, Any]:
        body = {"model": "default", "messages": list(messages), "temperature": 0}
        return self.call("POST", "/v1/chat/completions", body | {"max_tokens": num_tokens})

    def events(self, path: str, body: object) -> Generator[tuple[float, dict[str, Any]]]:
        """What is streamed, each with the seconds since it was asked; closing it aborts the
        request.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        with contextlib.closing(connection):
            start = time.perf_counter()
            for event in decoded(self.send(connection, "POST", path, body)):
                yield time.perf_counter() - start, event

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


def decoded(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
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
