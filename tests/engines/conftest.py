"""Fixtures of the tests against real engines. At most one engine runs at a time: two cores.

Each engine has an environment of its own; the tests of one that is not installed are left out.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from tests.engines.models import model
from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONLY_FOR = {"sglang": ["test_pages.py", "test_sglang*.py"], "vllm": ["test_vllm*.py"]}
MISSING = {engine: globs for engine, globs in ONLY_FOR.items() if find_spec(engine) is None}

collect_ignore_glob = [glob for globs in MISSING.values() for glob in globs]


def pytest_report_header() -> list[str]:
    return [
        f"tests/engines/{', '.join(globs)} left out: no {engine} here (bash ci/test.sh has it)"
        for engine, globs in MISSING.items()
    ]


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    return model("tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return model("smollm2-135m")


@pytest.fixture(scope="module")
def launch(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SglangServer]:
    """Starts a tiny model: `with launch("--page-size", "16", LMC_ENABLE="1") as server`."""

    def start(*flags: str, served: Path = tiny_llama, **environment: str) -> SglangServer:
        log = tmp_path_factory.mktemp("server") / "server.log"
        sizes = ("--max-total-tokens", "8192", "--max-running-requests", "4")
        return SglangServer(
            served,
            log,
            flags=("--skip-tokenizer-init", *sizes, *flags),
            environment={"OMP_NUM_THREADS": "1", **environment},
        )

    return start


@pytest.fixture(scope="module")
def launch_vllm(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., VllmServer]:
    """Starts the real model, as vLLM's completions need a tokenizer: `with launch_vllm(
    "--kv-offloading-backend", "lmc", "--kv-offloading-size", "1", LMC_TIERS=...) as server`.
    """

    def start(*flags: str, **environment: str) -> VllmServer:
        log = tmp_path_factory.mktemp("server") / "server.log"
        sizes = ("--max-model-len", "4352", "--max-num-batched-tokens", "4352")
        room = ("--kv-cache-memory-bytes", "512M", "--max-num-seqs", "4")
        return VllmServer(smollm2, log, flags=(*sizes, *room, *flags), environment=environment)

    return start
