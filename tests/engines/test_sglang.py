"""lmc inside a real, unmodified SGLang: the same tokens and log-probabilities as the engine's own
cache.

Prompts are random tokens for a tiny random model. Log-probabilities say more than tokens: with
float32 on one machine they are equal to the last bit where the same number of tokens came from a
cache.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines.server import Answer, ServerError, server_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engines.sglang_server import SglangServer

pytestmark = pytest.mark.engine

PAGE = 64
LINKER = {
    "linker": "LmcLinker",
    "linker_module_path": "lmc_sglang.linker",
    "linker_extra_config": {},
}


def tokens(n: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(5, 1000) for _ in range(n)]


def ask(server: SglangServer, prompt: list[int]) -> Answer:
    return server.generate(prompt, 8, logprobs=True)


def whole_pages(prompt: list[int], page: int = PAGE) -> int:
    """What a cache can give back at most: the last token is always computed."""
    return (len(prompt) - 1) // page * page


def same(a: Answer, b: Answer) -> bool:
    return (a.cached_tokens, a.output_ids, a.logprobs) == (
        b.cached_tokens,
        b.output_ids,
        b.logprobs,
    )


@dataclass(frozen=True)
class Repeated:
    cold: Answer
    engine_hit: Answer
    after_flush: Answer


def repeat(server: SglangServer, prompt: list[int]) -> Repeated:
    server.flush()
    cold, engine_hit = ask(server, prompt), ask(server, prompt)
    server.flush()
    return Repeated(cold, engine_hit, ask(server, prompt))


def check(asked: Repeated, cached_tokens: int) -> None:
    assert asked.cold.cached_tokens == 0
    assert asked.engine_hit.cached_tokens == cached_tokens
    assert same(asked.after_flush, asked.engine_hit)
    assert asked.after_flush.output_ids == asked.cold.output_ids


@pytest.fixture(scope="class")
def served(
    launch: Callable[..., SglangServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SglangServer, Answer]]:
    """The second server on a folder, and the first one's answer to `tokens(1500, seed=1)`."""
    folder = tmp_path_factory.mktemp("chunks")
    settings = {
        "LMC_ENABLE": "1",
        "LMC_RAM_GB": "0.1",
        "LMC_TIERS": f"file://{folder}?gb=1",
    }
    with launch("--chunked-prefill-size", "320", **settings) as server:
        first = repeat(server, tokens(1500, seed=1)).engine_hit
        server.drain()
    with launch("--chunked-prefill-size", "320", **settings) as server:
        yield server, first


@pytest.fixture(scope="class")
def server(served: tuple[SglangServer, Answer]) -> SglangServer:
    return served[0]


class TestSwitchedOnByEnvironment:
    """LMC_ENABLE=1 and `python -m sglang.launch_server`; prefill is cut off the chunk grid."""

    def test_pages_are_of_64_tokens_where_the_user_left_them_unset(
        self, server: SglangServer
    ) -> None:
        assert server.info()["page_size"] == PAGE

    def test_after_a_restart_as_the_engines_own_hit(
        self, served: tuple[SglangServer, Answer]
    ) -> None:
        server, before = served
        assert same(ask(server, tokens(1500, seed=1)), before)

    @pytest.mark.parametrize("length", [65, 256, 257, 1000, 2050])
    def test_after_a_flush_as_the_engines_own_hit(self, server: SglangServer, length: int) -> None:
        prompt = tokens(length, seed=length)
        check(repeat(server, prompt), whole_pages(prompt))

    def test_only_the_part_that_left_the_device_is_loaded(self, server: SglangServer) -> None:
        prompt = tokens(1128, seed=2)
        own = repeat(server, prompt).engine_hit
        server.flush()
        ask(server, prompt[:330])
        assert same(ask(server, prompt), own)

    def test_a_prompt_that_diverges_inside_a_chunk_reuses_the_pages_before(
        self, server: SglangServer
    ) -> None:
        ask(server, tokens(1000, seed=3))
        server.flush()
        answer = ask(server, tokens(1000, seed=3)[:600] + tokens(200, seed=4))
        assert answer.cached_tokens == 600 // PAGE * PAGE

    def test_a_conversation_reuses_every_turn(self, server: SglangServer) -> None:
        prompt = tokens(500, seed=5)
        for turn in range(3):
            server.flush()
            cached = ask(server, prompt).cached_tokens
            assert cached == (0 if turn == 0 else whole_pages(prompt[:-50])), turn
            prompt += tokens(50, seed=6 + turn)

    @pytest.mark.parametrize("length", [1, 63, 64])
    def test_a_prompt_of_no_whole_page_is_answered(self, server: SglangServer, length: int) -> None:
        check(repeat(server, tokens(length, seed=50 + length)), 0)

    def test_an_empty_prompt_is_refused_as_without_lmc(self, server: SglangServer) -> None:
        with pytest.raises(ServerError, match=r"400|empty"):
            ask(server, [])
        ask(server, tokens(100, seed=60))

    def test_aborted_while_it_answers(self, server: SglangServer) -> None:
        prompt = tokens(1000, seed=7)
        answer = server.stream(prompt, 3000)
        next(answer)
        answer.close()
        check_after_abort(server, prompt)

    def test_aborted_while_it_reads(self, server: SglangServer) -> None:
        prompt = tokens(4000, seed=8)
        abandon(server, prompt)
        check_after_abort(server, prompt)

    def test_aborted_while_it_loads(self, server: SglangServer) -> None:
        prompt = tokens(4000, seed=9)
        own = repeat(server, prompt).engine_hit
        server.flush()
        abandon(server, prompt)
        server.flush()
        assert same(ask(server, prompt), own)

    def test_new_weights_in_place_miss_everything(
        self, server: SglangServer, tiny_llama: Path
    ) -> None:
        prompt = tokens(1000, seed=10)
        repeat(server, prompt)
        server.call("POST", "/update_weights_from_disk", {"model_path": str(tiny_llama)})
        check(repeat(server, prompt), whole_pages(prompt))


def abandon(server: SglangServer, prompt: list[int]) -> None:
    """Sends a request and hangs up before anything is answered."""
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/generate", json.dumps(body), {"Content-Type": "application/json"}
        )


def check_after_abort(server: SglangServer, prompt: list[int]) -> None:
    server.flush()  # waits until the engine is idle
    ask(server, prompt)
    own = ask(server, prompt)
    server.flush()
    assert same(ask(server, prompt), own)


@pytest.fixture(scope="class")
def two_ranks(launch: Callable[..., SglangServer]) -> Iterator[SglangServer]:
    flags = (
        *("--tp-size", "2", "--page-size", "16", "--enable-unified-cache-external-linker"),
        *("--unified-cache-external-linker-backend", "dynamic"),
        *("--unified-cache-external-linker-config", json.dumps(LINKER)),
    )
    settings = {
        "LMC_RAM_GB": "0.1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
    }
    with launch(*flags, **settings) as server:
        yield server


class TestSwitchedOnByFlags:
    """SGLang's own linker flags, on two ranks, with the user's page size. SGLang ends ranks that
    decide differently.
    """

    def test_two_ranks_after_a_flush_as_the_engines_own_hit(self, two_ranks: SglangServer) -> None:
        prompt = tokens(1000, seed=11)
        check(repeat(two_ranks, prompt), whole_pages(prompt, page=16))
        assert "Rank consensus checker is enabled" in two_ranks.log.read_text()

    def test_two_ranks_forget_alike_what_old_weights_computed(
        self, two_ranks: SglangServer, tiny_llama: Path
    ) -> None:
        prompt = tokens(1000, seed=14)
        repeat(two_ranks, prompt)
        two_ranks.call("POST", "/update_weights_from_disk", {"model_path": str(tiny_llama)})
        abandon(two_ranks, tokens(4000, seed=15))
        check(repeat(two_ranks, prompt), whole_pages(prompt, page=16))

    def test_the_users_page_size_stays(self, two_ranks: SglangServer) -> None:
        assert two_ranks.info()["page_size"] == 16


def test_switched_on_by_an_import(tiny_llama: Path, tmp_path: Path) -> None:
    prompt = tokens(1000, seed=12)
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(prompt))
    script = Path(__file__).with_name("launch_script.py")
    done = subprocess.run(
        [sys.executable, script, tiny_llama, file],
        env=server_environment({"OMP_NUM_THREADS": "1", "LMC_RAM_GB": "0.1"}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    hit = {**answers["cold"], "cached_tokens": whole_pages(prompt)}
    assert answers == {"cold": {**hit, "cached_tokens": 0}, "engine_hit": hit, "after_flush": hit}


def test_installed_but_not_enabled_sglang_is_as_without_it(
    launch: Callable[..., SglangServer],
) -> None:
    with launch() as server:
        info = server.info()
        assert info["page_size"] == 1
        assert not info["enable_unified_cache_external_linker"]
        assert "lmc" not in info["internal_states"][0]
        prompt = tokens(500, seed=13)
        asked = repeat(server, prompt)
        assert asked.engine_hit.cached_tokens == len(prompt) - 1
        assert asked.after_flush.cached_tokens == 0
