"""Every kind of model that SGLang runs on a CPU: many prompts of mixed lengths and shared
beginnings, asked of SGLang alone, of lmc after a flush, and of lmc after a restart.

Where the same KV came from a cache, tokens and log-probabilities are equal to the last bit. A page
may have been computed twice, because SGLang had let go of the window before it: then the engine
holds the second and lmc the first, which are as good, but not the same in their last bits.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.engines.models import model
from tests.engines.soak import is_quiet, settled
from tests.engines.test_sglang import PAGE, ask, same, tokens, whole_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.engines.server import Answer
    from tests.engines.sglang_server import SglangServer

pytestmark = pytest.mark.engine

TWO_RANKS = ("--tp-size", "2")
KINDS = {
    "plain": ("tiny-llama", ()),
    "mla": ("tiny-mla", ()),
    "window": ("tiny-mellum", ()),
    "two-ranks": ("tiny-llama", TWO_RANKS),
    "mla-two-ranks": ("tiny-mla", TWO_RANKS),
}


def prompts_of(number: int) -> list[list[int]]:
    """Documents with questions, and prompts on their own."""
    rng = random.Random(number)
    documents = [tokens(rng.randrange(200, 1800), seed=100 + i) for i in range(max(1, number // 6))]
    found = []
    for i in range(number):
        own = tokens(rng.randrange(1, 600), seed=1000 + i)
        document = rng.choice(documents)
        found.append(document[: rng.randrange(len(document))] + own if rng.random() < 0.8 else own)
    return found


class Run:
    """The prompts against one kind of model, server after server."""

    def __init__(
        self, launch: Callable[..., SglangServer], kind: str, number: int, folder: Path
    ) -> None:
        name, flags = KINDS[kind]
        self.launch, self.served, self.flags = launch, model(name), flags
        self.windows = kind == "window"
        self.environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if flags == TWO_RANKS else {}
        self.settings = {
            "LMC_ENABLE": "1",
            "LMC_RAM_GB": "4",
            "LMC_TIERS": f"file://{folder}?gb=4",
        }
        self.prompts = prompts_of(number)

    def start(self, settings: Mapping[str, str]) -> SglangServer:
        flags = (*self.flags, "--page-size", str(PAGE), "--chunked-prefill-size", "512")
        return self.launch(*flags, served=self.served, **self.environment, **settings)

    def alone(self) -> tuple[list[Answer], list[Answer]]:
        """Cold, and SGLang's own hit."""
        cold, hit = [], []
        with self.start({}) as server:
            for prompt in self.prompts:
                server.flush()
                cold.append(ask(server, prompt))
                hit.append(ask(server, prompt))
        return cold, hit

    def with_lmc(self) -> tuple[list[Answer], list[Answer], list[Answer]]:
        """The first time, SGLang's own hit, and after a flush: all of it was asked before."""
        first, own = [], []
        with self.start(self.settings) as server:
            for prompt in self.prompts:
                server.flush()
                first.append(ask(server, prompt))
                own.append(ask(server, prompt))
            again = after_flushes(server, self.prompts)
            server.drain()
        return first, own, again

    def restarted(self) -> list[Answer]:
        """What was used last has come up by itself: how fast a disk is must not decide here."""
        with self.start(self.settings) as server:
            assert is_quiet(settled(server))
            return after_flushes(server, self.prompts)


def after_flushes(server: SglangServer, prompts: Sequence[list[int]]) -> list[Answer]:
    answers = []
    for prompt in prompts:
        server.flush()
        answers.append(ask(server, prompt))
    return answers


def shared_tokens(prompts: Sequence[list[int]]) -> list[int]:
    """Of each prompt, the whole pages that one before it has in common with it."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for prompt in prompts:
        pages = [tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)]
        shared = next((n for n, page in enumerate(pages) if page not in seen), len(pages))
        found.append(min(shared * PAGE, whole_pages(prompt)))
        seen.update(pages)
    return found


def check(run: Run) -> None:
    cold, hit = run.alone()
    first, own, after_flush = run.with_lmc()
    after_restart = run.restarted()
    shared = shared_tokens(run.prompts)
    for i, prompt in enumerate(run.prompts):
        assert own[i].cached_tokens == hit[i].cached_tokens == whole_pages(prompt)
        computed_twice = first[i].cached_tokens < shared[i]
        assert not computed_twice or run.windows
        for again in (after_flush[i], after_restart[i]):
            assert again.cached_tokens == own[i].cached_tokens
            assert again.output_ids == own[i].output_ids
            assert computed_twice or same(again, own[i])
        if hit[i].output_ids == cold[i].output_ids:
            assert own[i].output_ids == cold[i].output_ids


@pytest.mark.parametrize("kind", ["mla", "window", "mla-two-ranks"])
def test_a_dozen_prompts(launch: Callable[..., SglangServer], tmp_path: Path, kind: str) -> None:
    check(Run(launch, kind, 12, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_prompts(
    launch: Callable[..., SglangServer], tmp_path: Path, kind: str
) -> None:
    check(Run(launch, kind, 200, tmp_path))
