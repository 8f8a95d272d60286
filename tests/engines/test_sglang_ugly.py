"""Ugly moments in a real SGLang with lmc: crowds, too little memory, retraction, a stop amid a
spill, a disk that lies. Whatever happens, nobody is failed and no token is wrong.

Each moment and its test, here and in tests/integrations (i) or test_sglang.py (e):

    chunked prefill, off the chunk grid       e TestSwitchedOnByEnvironment (chunks of 320)
    evicted while offloads are pending        64_different; i test_models.py random_prompts
    retracted and resumed                     TestCrowds (SGLANG_TEST_RETRACT)
    aborted: staging, waiting, promised,      i test_linker.py aborted_*; test_patience.py
      queued, loading, storing                  aborted_while_it_waits
    flushed while it loads, while it stores   i test_linker.py flush_*; test_models.py flush_*
    weights changed in place, every kind      i test_linker.py weights_*; e new_weights_in_place;
                                                the soak; compat.WEIGHT_CHANGES in test_compat.py
    clients that vanish                       e aborted_while_*; the soak
    64 identical prompts                      64_identical; i test_patience.py identical_*, twin_*
    64 different ones                         64_different
    a prompt larger than RAM                  larger_than_ram; i test_linker.py longer_than_ram
    RAM full of what is held                  i test_linker.py full_ram_of_held_chunks
    a tier that hangs                         i test_patience.py hangs; the soak
    a tier that returns garbage               i test_linker.py damage_on_disk; the soak
    a stop amid a spill                       stopped_while_it_spills; i acknowledged_is_there
    another model in the same folder          i test_linker.py another_identity
    ranks that fail or lag                    i test_ranks.py
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.engines.soak import Soak, is_quiet, settled, start
from tests.engines.test_sglang import ask, tokens, whole_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.engines.server import Answer
    from tests.engines.sglang_server import SglangServer

pytestmark = pytest.mark.engine


def together(server: SglangServer, prompts: Sequence[list[int]], n: int = 8) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(lambda prompt: server.generate(prompt, n), prompts))


@pytest.fixture(scope="class")
def crowded(
    launch: Callable[..., SglangServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangServer]:
    """A pool of 4,096 tokens, RAM for fewer, a disk, and every third step somebody is thrown out
    of the batch.
    """
    settings = {
        "LMC_ENABLE": "1",
        "LMC_RAM_GB": "0.0064",
        "LMC_TIERS": f"file://{tmp_path_factory.mktemp('chunks')}?gb=1",
        "SGLANG_TEST_RETRACT": "1",
    }
    sizes = ("--max-total-tokens", "4096", "--max-running-requests", "64")
    with launch(*sizes, "--chunked-prefill-size", "320", **settings) as server:
        yield server


class TestCrowds:
    def test_64_identical_prompts(self, crowded: SglangServer) -> None:
        prompt = tokens(900, seed=1)
        alone = ask(crowded, prompt)
        crowded.flush()
        before = (crowded.lmc() or {}).get("pages.loaded", 0)
        answers = together(crowded, [prompt] * 64)
        assert {answer.output_ids for answer in answers} == {alone.output_ids}
        state = crowded.lmc() or {}
        assert state["pages.loaded"] - before < 32 * (whole_pages(prompt) // 64), "loaded each"

    def test_64_different_prompts(self, crowded: SglangServer) -> None:
        """More than device and RAM hold: evicted while they are stored, retracted and resumed."""
        prompts = [tokens(400 + n, seed=100 + n) for n in range(64)]
        alone = [crowded.generate(prompt, 24).output_ids for prompt in prompts]
        for _ in range(2):
            answers = together(crowded, prompts, 24)
            assert [answer.output_ids for answer in answers] == alone
        assert any(answer.cached_tokens for answer in answers)

    def test_a_prompt_larger_than_ram(self, crowded: SglangServer) -> None:
        prompt = tokens(3900, seed=2)
        settled(crowded)
        alone = ask(crowded, prompt)
        crowded.flush()
        assert (crowded.lmc() or {})["ram.slots"] * 256 < len(prompt)
        again = ask(crowded, prompt)
        assert again.output_ids == alone.output_ids
        assert again.cached_tokens > 0

    def test_nothing_is_left(self, crowded: SglangServer) -> None:
        crowded.flush()
        state = settled(crowded)
        assert is_quiet(state), state


def test_stopped_while_it_spills(launch: Callable[..., SglangServer], tmp_path: Path) -> None:
    """What the disk had acknowledged is there and right; the rest is computed."""
    settings = {"LMC_ENABLE": "1", "LMC_TIERS": f"file://{tmp_path}?gb=1", "LMC_RAM_GB": "0.1"}
    prompts = [tokens(1500, seed=200 + n) for n in range(5)]
    with launch(**settings) as server:
        alone = [ask(server, prompt).output_ids for prompt in prompts]
    with launch(**settings) as server:
        answers = [ask(server, prompt) for prompt in prompts]
    assert [answer.output_ids for answer in answers] == alone
    assert sum(answer.cached_tokens for answer in answers) > 0


def test_a_soak_of_a_minute(tmp_path: Path) -> None:
    """`python -m tests.engines.soak` is the long form."""
    server, trouble = start(tmp_path)
    with server:
        soak = Soak(server, trouble)
        soak.learn()
        report = soak.run(45)
    assert soak.problems() == [], json.dumps(report.state)
    assert report.done["answered"] > 0
