"""Fixtures of the tests against real engines. At most one engine runs at a time: two cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engines.models import model
from tests.engines.sglang_server import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    return model("tiny-llama")


@pytest.fixture(scope="module")
def launch(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """Starts the tiny model: `with launch("--page-size", "16", LMC_ENABLE="1") as server`."""

    def start(*flags: str, **environment: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "server.log"
        sizes = ("--max-total-tokens", "8192", "--max-running-requests", "4")
        return Server(
            tiny_llama,
            log,
            flags=("--skip-tokenizer-init", *sizes, *flags),
            environment={"OMP_NUM_THREADS": "1", **environment},
        )

    return start
