"""lmc inside a real vLLM: the same tokens and log-probabilities as the engine's own prefix cache.

Both caches hold whole blocks of 128 tokens, of the same bytes. Where a prompt is not whole blocks
the same number of tokens comes from either, and with float32 on one machine every log-probability
is equal to the last bit. Of whole blocks vLLM's own hit recomputes the last one, lmc's only the
last token: another shape for the kernels, so only the tokens are equal there.

"""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines.models import make_adapter, model
from tests.engines.vllm_engine import Answer, VllmEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.engine

BLOCK = 128
ROOT = Path(__file__).resolve().parents[2]
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
REAL = {
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "kv_cache_memory_bytes": 1 << 29,
}
REAL_TOKEN_BYTES = 46_080


def tokens(n: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(5, 1000) for _ in range(n)]


def whole_blocks(n: int, block: int = BLOCK) -> int:
    return n // block * block


@pytest.fixture(scope="session")
def text(smollm2: Path) -> list[int]:
    """Text that a person wrote, so that answers hang on what was read."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    files = [ROOT / "README.md", ROOT / "LICENSE", *sorted(ROOT.glob("lmc/**/*.py"))]
    return [token for file in files for token in tokenizer.encode(file.read_text()).ids]


def prompts(text: Sequence[int], lengths: Sequence[int], seed: int) -> list[list[int]]:
    """One of each length; every third begins as an earlier one does."""
    source = random.Random(seed)
    made: list[list[int]] = []
    for i, n in enumerate(lengths):
        at = source.randrange(len(text) - n)
        prompt = list(text[at : at + n])
        if i % 3 == 2:
            earlier = source.choice(made)
            shared = source.randrange(1, min(n, len(earlier)) + 1)
            prompt[:shared] = earlier[:shared]
        made.append(prompt)
    return made


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VllmEngine]:
    """Starts a model of models.py: `with start("tiny-llama", LMC_TIERS=...) as engine`."""

    def launch(name: str, **options: object) -> VllmEngine:
        log = tmp_path_factory.mktemp("vllm") / "engine.log"
        return VllmEngine(model(name), log, **options)

    return launch


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    first: Answer
    own: Answer
    options: dict[str, object] = field(default_factory=dict)


def same(a: Answer, b: Answer) -> bool:
    return (a.cached_tokens, a.output_ids, a.logprobs) == (
        b.cached_tokens,
        b.output_ids,
        b.logprobs,
    )


def ask_twice(
    engine: VllmEngine, prompt: list[int], num_tokens: int = 6, **options: object
) -> Asked:
    first, own = (engine.ask([prompt], num_tokens, **options)[0] for _ in range(2))
    return Asked(prompt, first, own, options)


def ask_again(engine: VllmEngine, asked: Asked, **options: object) -> Answer:
    """The same, with nothing in vLLM's own cache."""
    engine.flush()
    return engine.ask([asked.prompt], len(asked.own.output_ids), **asked.options, **options)[0]


def check_back(asked: Asked, back: Answer, block: int = BLOCK) -> None:
    """`back` is what lmc brought: as the engine's own hit, and as the first run where that is."""
    n = len(asked.prompt)
    assert back.cached_tokens == whole_blocks(n, block)
    if n % block:
        assert same(back, asked.own), n
    elif asked.own.output_ids == asked.first.output_ids:
        assert back.output_ids == asked.own.output_ids, n


def check_flushed(engine: VllmEngine, asked: Sequence[Asked], block: int = BLOCK) -> None:
    for one in asked:
        check_back(one, ask_again(engine, one), block)


def chunk_files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "chunks").rglob("*") if file.is_file())


def flip_a_bit(file: Path) -> None:
    """In a file of its own: other names of it keep the old one."""
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.unlink()
    file.write_bytes(data)


def wait_for_files(folder: Path, number: int) -> list[Path]:
    deadline = time.monotonic() + 20
    while len(files := chunk_files(folder)) < number and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(files) == number
    return files


LENGTHS = (17, 127, 128, 129, 150, 200, 255, 256, 257, 258, 300, 333, 383, 384, 385, 400, 450)
LENGTHS += (500, 512, 513, 600, 640, 641, 700, 900)


def many_lengths(number: int) -> tuple[int, ...]:
    """Up to 900, every other one near whole blocks; a few beyond 2,000."""
    source = random.Random(5)
    lengths = [2000, 2048, 2049, 2175, 2250]
    while len(lengths) < number:
        near = BLOCK * source.randrange(1, 6) + source.randrange(-5, 6)
        lengths += [source.randrange(17, 901), near]
    source.shuffle(lengths)
    return tuple(lengths[:number])


@dataclass
class First:
    """What the first process on a folder was asked, and how it ended. `cold` is the first run where
    that found nothing to begin with, else one more that was to look for nothing.
    """

    folder: Path
    settings: dict[str, object]
    asked: list[Asked]
    back: list[Answer]
    cold: list[Answer]
    turns: list[Answer]
    last: Asked
    exit_code: int
    survivors: list[str]
    own_files: set[str]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(LENGTHS, id="25 prompts"),
        pytest.param(many_lengths(200), id="200 prompts", marks=pytest.mark.slow),
    ],
)
def first(
    request: pytest.FixtureRequest,
    start: Callable[..., VllmEngine],
    text: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> First:
    """Three processes, as vLLM runs by default; prefill in parts of 384 tokens."""
    lengths: Sequence[int] = request.param
    folder = tmp_path_factory.mktemp("chunks")
    room_gib = 1 + sum(lengths) * REAL_TOKEN_BYTES / (1 << 30)
    settings = {**REAL, "LMC_TIERS": f"file://{folder}", "kv_offloading_size": room_gib}
    engine = start("smollm2-135m", max_num_batched_tokens=384, **settings)
    with engine:
        asked = [ask_twice(engine, prompt) for prompt in prompts(text, lengths, seed=1)]
        back = [ask_again(engine, one) for one in asked]
        cold = [
            ask_again(engine, one, cold=True) if one.first.cached_tokens else one.first
            for one in asked
        ]
        turns = []
        conversation = text[5000:5100]
        for turn in range(3):
            engine.flush()
            turns += engine.ask([conversation], 40)
            conversation = [*conversation, *turns[-1].output_ids, *text[6000 + turn : 6020 + turn]]
        last = ask_twice(engine, text[8000:8700])
        code = engine.stop()
    own_files = {file.name for file in engine.log.parent.iterdir() if file.is_file()}
    survivors = engine.survivors
    return First(folder, settings, asked, back, cold, turns, last, code, survivors, own_files)


def num_kept(first: First) -> int:
    """Tokens that lmc can bring back, of all prompts."""
    return sum(whole_blocks(len(one.prompt)) for one in first.asked)


class TestRealModel:
    """SmolLM2-135M reads the text of this repository."""

    def test_back_from_ram_as_the_engines_own_hit(self, first: First) -> None:
        for asked, back in zip(first.asked, first.back, strict=True):
            check_back(asked, back)

    def test_the_engines_own_hit_is_as_the_cold_run_nearly_always(self, first: First) -> None:
        same_tokens = 0
        for asked, back, cold in zip(first.asked, first.back, first.cold, strict=True):
            assert cold.cached_tokens == 0
            if asked.own.output_ids == cold.output_ids:
                assert back.output_ids == cold.output_ids
                same_tokens += 1
        assert same_tokens >= 0.96 * len(first.asked)

    def test_answers_hang_on_what_was_read(self, first: First) -> None:
        assert len({asked.own.output_ids for asked in first.asked}) > len(first.asked) * 0.8

    def test_an_answer_comes_back_as_the_next_turns_beginning(self, first: First) -> None:
        lengths = [100, 160, 220]
        known = [0, *(whole_blocks(n + 40 - 1) for n in lengths[:-1])]
        assert [turn.cached_tokens for turn in first.turns] == known

    def test_the_process_ends_well_and_leaves_nothing(self, first: First) -> None:
        assert (first.exit_code, first.survivors) == (0, [])
        assert first.own_files == {"engine.log"}

    def test_a_new_process_goes_on_where_the_first_ended(
        self, second: VllmEngine, first: First
    ) -> None:
        check_flushed(second, [first.last, *first.asked])

    @pytest.mark.slow
    def test_a_copy_that_failed_is_computed_again(self, second: VllmEngine, first: First) -> None:
        before = second.counters()
        asked = [one for one in first.asked if len(one.prompt) >= BLOCK][::4]
        for one in asked:
            second.call("fail_loads", number=1)
            assert ask_again(second, one).output_ids == one.own.output_ids, len(one.prompt)
        assert counted(before, second.counters(), "load.failed") == len(asked)

    @pytest.mark.slow
    def test_what_follows_a_damaged_chunk_is_computed_again(
        self, first: First, start: Callable[..., VllmEngine], tmp_path: Path
    ) -> None:
        shutil.copytree(first.folder, tmp_path, copy_function=os.link, dirs_exist_ok=True)
        for file in chunk_files(tmp_path)[::3]:
            flip_a_bit(file)
        settings = first.settings | IN_PROCESS | {"LMC_TIERS": f"file://{tmp_path}"}
        with start("smollm2-135m", **settings) as engine:
            answers = [ask_again(engine, one) for one in first.asked]
            assert engine.counters()["disk.miss.checksum"] > len(answers) / 10
        assert [a.output_ids for a in answers] == [one.own.output_ids for one in first.asked]
        hits = sum(answer.cached_tokens for answer in answers)
        assert 0 < hits < 0.9 * num_kept(first)

    @pytest.mark.slow
    def test_preempted_requests_go_on_as_if_alone(
        self, first: First, start: Callable[..., VllmEngine]
    ) -> None:
        """All of them, short ones first, where the longest just fits; a preempted one has only lmc
        to begin from. What does not come up in time is computed.
        """
        room = {"num_gpu_blocks_override": 20, "max_num_seqs": 16, "enable_prefix_caching": False}
        asked = sorted(first.asked, key=lambda one: len(one.prompt))
        with start("smollm2-135m", **first.settings, **IN_PROCESS, **room) as engine:
            answers = engine.ask([one.prompt for one in asked], 6)
            counters = engine.counters()
        assert [a.output_ids for a in answers] == [one.own.output_ids for one in asked]
        assert counters["preemptions"] >= len(asked) // 100
        assert counters["tokens.loaded"] > 0


@pytest.fixture(scope="module")
def second(first: First, start: Callable[..., VllmEngine]) -> Iterator[VllmEngine]:
    with start("smollm2-135m", **first.settings, **IN_PROCESS) as engine:
        yield engine


TINY = pytest.mark.parametrize(
    ("name", "block", "options"),
    [
        pytest.param("tiny-mla", 16, {}, id="mla"),
        pytest.param("tiny-gemma3", BLOCK, {}, id="sliding windows"),
        pytest.param(
            "tiny-gemma3",
            BLOCK,
            {"disable_hybrid_kv_cache_manager": True},
            id="sliding windows as full attention",
        ),
        pytest.param("tiny-llama", BLOCK, {"tensor_parallel_size": 2}, id="two workers"),
    ],
)


class TestOtherPools:
    """Latent attention; sliding windows beside full attention: groups of their own, or one; heads
    shared out among workers, each a process.
    """

    @TINY
    def test_from_ram_and_in_a_new_process_as_the_engines_own_hit(
        self,
        start: Callable[..., VllmEngine],
        tmp_path: Path,
        name: str,
        block: int,
        options: dict[str, object],
    ) -> None:
        settings = {**IN_PROCESS, **options, "LMC_TIERS": f"file://{tmp_path}"}
        lengths = [*random.Random(2).choices(range(17, 700), k=16), 256, 640, 1024, 2000, 2200]
        source = [token for seed in range(4) for token in tokens(2500, seed)]
        with start(name, **settings) as engine:
            asked = [ask_twice(engine, prompt) for prompt in prompts(source, lengths, seed=3)]
            check_flushed(engine, asked, block)
        with start(name, lmc=False, LMC_ENABLE="1", LMC_RAM_GB="0.5", **settings) as engine:
            check_flushed(engine, asked, block)


class TestAdapters:
    def test_an_adapter_hits_what_its_own_weights_left(
        self, start: Callable[..., VllmEngine], tmp_path: Path
    ) -> None:
        """The third adapter is trained again between the processes."""
        places = [tmp_path / name for name in ("one", "two", "three")]
        for seed, place in enumerate(places):
            make_adapter(place, seed)
        adapters = [None, *((place.name, n, str(place)) for n, place in enumerate(places, 1))]
        settings = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8, **IN_PROCESS}
        settings["LMC_TIERS"] = f"file://{tmp_path / 'chunks'}"
        prompt = tokens(1000, seed=5)
        with start("tiny-llama", **settings) as engine:
            asked = [ask_twice(engine, prompt, adapter=adapter) for adapter in adapters]
            check_strangers(asked)
            check_flushed(engine, asked)
        make_adapter(places[2], seed=3)
        with start("tiny-llama", **settings) as engine:
            check_flushed(engine, asked[:3])
            retrained = ask_twice(engine, prompt, adapter=adapters[3])
            check_strangers([*asked, retrained])
            check_flushed(engine, [retrained])


def check_strangers(asked: Sequence[Asked]) -> None:
    """None found anything of another's, and no answer is another's."""
    assert [one.first.cached_tokens for one in asked] == [0] * len(asked)
    assert len({one.own.output_ids for one in asked}) == len(asked)


CROWD = 32


@pytest.fixture(scope="class")
def hurt(
    start: Callable[..., VllmEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, list[Asked]]]:
    """The second process on a folder in which a chunk of the first prompt was cut off, and a bit
    of one of the second is another.
    """
    folder = tmp_path_factory.mktemp("chunks")
    settings = {"max_num_seqs": CROWD, "LMC_TIERS": f"file://{folder}", **IN_PROCESS}
    asked: list[Asked] = []
    files: list[list[Path]] = []
    with start("tiny-llama", **settings) as engine:
        for seed in range(2):
            asked.append(ask_twice(engine, tokens(1000, seed)))
            known = {file for chunks in files for file in chunks}
            files.append(sorted({*wait_for_files(folder, len(known) + 4)} - known))
    os.truncate(files[0][0], files[0][0].stat().st_size - 1000)
    flip_a_bit(files[1][0])
    with start("tiny-llama", **settings) as engine:
        yield engine, asked


@pytest.fixture(scope="class")
def engine(hurt: tuple[VllmEngine, list[Asked]]) -> VllmEngine:
    return hurt[0]


def counted(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


class TestTrouble:
    """One process, where lmc's counters are within reach."""

    @pytest.mark.parametrize(("number", "cause"), [(0, "truncated"), (1, "checksum")])
    def test_a_damaged_chunk_ends_the_hit_there_and_is_computed_again(
        self, hurt: tuple[VllmEngine, list[Asked]], number: int, cause: str
    ) -> None:
        engine, asked = hurt[0], hurt[1][number]
        (answer,) = engine.ask([asked.prompt], 6)
        assert answer.cached_tokens in (0, 256, 512, 768)  # the chunk is one of four
        assert answer.output_ids == asked.first.output_ids
        assert engine.counters()[f"disk.miss.{cause}"] == 1
        check_flushed(engine, [asked])

    def test_a_crowd_with_one_prompt_loads_it_once(self, engine: VllmEngine) -> None:
        prompt = tokens(2000, seed=1)
        asked = ask_twice(engine, prompt)
        engine.flush()
        before = engine.counters()
        answers = engine.ask([prompt] * CROWD, 6)
        assert counted(before, engine.counters(), "tokens.loaded") == whole_blocks(2000)
        assert {answer.output_ids for answer in answers} == {asked.own.output_ids}

    def test_a_copy_that_failed_is_computed_again(self, engine: VllmEngine) -> None:
        asked = ask_twice(engine, tokens(1000, seed=2))
        engine.flush()
        before = engine.counters()
        engine.call("fail_loads", number=1)
        (answer,) = engine.ask([asked.prompt], 6)
        assert (answer.output_ids, answer.logprobs) == (
            asked.first.output_ids,
            asked.first.logprobs,
        )
        assert counted(before, engine.counters(), "load.failed") == 1
        check_flushed(engine, [asked])

    def test_one_of_a_crowd_whose_copy_failed(self, engine: VllmEngine) -> None:
        asked = [ask_twice(engine, tokens(600, seed=10 + i)) for i in range(4)]
        engine.flush()
        engine.call("fail_loads", number=1)
        answers = engine.ask([one.prompt for one in asked], 6)
        assert [a.output_ids for a in answers] == [one.own.output_ids for one in asked]
        check_flushed(engine, asked)

    def test_new_weights_hit_nothing_old(self, engine: VllmEngine) -> None:
        asked = ask_twice(engine, tokens(1000, seed=3))
        engine.flush(connector=True)
        (again,) = engine.ask([asked.prompt], 6)
        assert same(again, asked.first)
        engine.flush()
        check_back(asked, *engine.ask([asked.prompt], 6))

    def test_another_salt_is_another_prompt(self, engine: VllmEngine) -> None:
        asked = ask_twice(engine, tokens(1000, seed=4))
        engine.flush()
        (salted,) = engine.ask([asked.prompt], 6, salt="other")
        assert same(salted, asked.first)


@pytest.mark.parametrize("prefix_caching", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preempted_requests_go_on_from_what_was_kept(
    start: Callable[..., VllmEngine], prefix_caching: bool
) -> None:
    """Nine blocks, and vLLM's null block, for three requests: they need twelve before the end."""
    room = {"num_gpu_blocks_override": 10, "max_model_len": 640}
    with start("tiny-llama", enable_prefix_caching=prefix_caching, **room, **IN_PROCESS) as engine:
        assert engine.config["blocks"] == 10
        given = [tokens(370, seed) for seed in range(3)]
        alone = [engine.ask([prompt], 40, salt=str(i))[0] for i, prompt in enumerate(given)]
        assert [answer.cached_tokens for answer in alone] == [0, 0, 0]
        before = engine.counters()
        together = engine.ask(given, 40)
        assert [a.output_ids for a in together] == [a.output_ids for a in alone]
        if not prefix_caching:
            assert counted(before, engine.counters(), "tokens.loaded") >= 256
            again = engine.ask([given[0]], 40)[0]
            assert again.output_ids == alone[0].output_ids
            assert again.cached_tokens == whole_blocks(370)
