"""The examples do what their docstrings say, with the engine of this environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines import vllm_server
from tests.engines.server import CPU_ENVIRONMENT
from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engines.server import Server

ROOT = Path(__file__).parents[2]
ENGINE = next((engine for engine in ("sglang", "vllm") if find_spec(engine)), "")
DOCUMENTS = ("LICENSE", "CHANGELOG.md")

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not ENGINE, reason="neither SGLang nor vLLM is installed"),
]


def example(name: str, *arguments: str, **environment: str) -> list[tuple[int, int]]:
    """What an example printed of each answer: tokens from cache, tokens of the prompt."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | CPU_ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"(\d+) of (\d+) tokens from cache", done.stdout)
    return [(int(cached), int(prompt)) for cached, prompt in found]


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    started: Server
    if ENGINE == "vllm":
        flags = ("--max-model-len", "4352", "--kv-cache-memory-bytes", "512M")
        switch = ("--kv-offloading-backend", "lmc", "--kv-offloading-size", "1")
        started = VllmServer(smollm2, log, flags=(*flags, *switch))
    else:
        flags = ("--max-total-tokens", "8192", "--max-running-requests", "4")
        started = SglangServer(smollm2, log, flags=flags, environment={"LMC_ENABLE": "1"})
    with started:
        yield started


def test_questions_about_warmed_documents_find_them_in_the_cache(server: Server) -> None:
    arguments = ("--url", url_of(server), "--characters", "3000", *DOCUMENTS)
    warmed, questions = example("rag", *arguments)[:2], example("rag", *arguments)[2:]
    assert len(questions) == 3 * len(DOCUMENTS)
    for number, (cached, prompt) in enumerate(questions):
        document = warmed[number % len(DOCUMENTS)][1]
        assert cached >= document // 128 * 128 - 128, "the document was read again"
        assert prompt > document


def test_a_turn_of_a_chat_reads_only_what_is_new(server: Server) -> None:
    turns = example("chat", "--url", url_of(server), "--tokens", "16")
    assert len(turns) == 4
    for (_, before), (cached, _) in pairwise(turns):
        assert cached >= before // 128 * 128


def test_a_second_process_finds_the_kv_of_the_first(smollm2: Path, tmp_path: Path) -> None:
    environment = {"LMC_TIERS": f"file://{tmp_path}?gb=1"}
    device = ("--device", "cpu") if ENGINE == "sglang" else ()
    if ENGINE == "vllm":
        environment |= vllm_server.CPU_ENVIRONMENT
    arguments = (str(smollm2), "LICENSE", "--dtype", "float32", *device)
    first = example(f"offline_{ENGINE}", *arguments, **environment)
    second = example(f"offline_{ENGINE}", *arguments, **environment)
    (cold, prompt), *again = first + second
    assert cold == 0
    assert all(cached >= prompt // 128 * 128 - 128 for cached, _ in again)
