"""The core on the scheduler's thread: naming and finding a prompt, leases, eviction, and what the
index costs the garbage collector.

Off by default: a plain run goes through each case once, small. Measure with
    pytest tests/bench/test_bench_store.py --benchmark-enable -s
Times decide no test.
"""

from __future__ import annotations

import gc
import statistics
import time
from array import array
from typing import TYPE_CHECKING

import pytest

from lmc.keys import Key, KeyChain, Namespace
from lmc.layout import KVLayout
from lmc.store import TieredStore
from lmc.tiers.ram import Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

NUM_TOKENS = 128 << 10
TOKENS = array("q", range(NUM_TOKENS))
NUM_CHUNKS = NUM_TOKENS // 256
NAMESPACE = Namespace.of({"model": "bench"})


def chunks_of(keys: Sequence[Key], steps: int) -> list[Chunk]:
    return [
        Chunk(tuple(keys[i : i + steps]), keys[i - 1] if i else None)
        for i in range(0, len(keys), steps)
    ]


def open_store(page_tokens: int, num_chunks: int) -> TieredStore:
    """Slots are tiny, and never written to: the index is what is measured."""
    layout = KVLayout(page_tokens, 256, (1,))
    return TieredStore(layout, NAMESPACE, num_chunks * (4096 + 4096))


def fill(store: TieredStore, num_chunks: int) -> None:
    """Other prompts, of 64 chunks each."""
    steps = store.layout.chunk_steps
    for doc in range(num_chunks // 64):
        keys = KeyChain(b"%d" % doc, 1).extend(array("q", range(64 * steps)))
        store.reserve(chunks_of(keys, steps)).commit()


def median_ms(work: Callable[[], object], num_rounds: int = 15) -> float:
    taken = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


@pytest.mark.parametrize("page_tokens", [64, 16])
def test_name_and_find_128k_tokens(benchmark: BenchmarkFixture, page_tokens: int) -> None:
    num_cached = 100_000 if benchmark.enabled else 1_000
    store = open_store(page_tokens, num_cached + NUM_CHUNKS)
    fill(store, num_cached)
    step = store.layout.step_tokens

    def name() -> list[Key]:
        return KeyChain(b"prompt", step).extend(TOKENS)

    keys = name()
    store.reserve(chunks_of(keys, store.layout.chunk_steps)).commit()
    assert benchmark(lambda: store.lookup(name())) == len(keys)
    if benchmark.enabled:
        naming, finding = median_ms(name), median_ms(lambda: store.lookup(keys))
        unknown = KeyChain(b"unknown", step).extend(TOKENS)
        missing = median_ms(lambda: store.lookup(unknown))
        share = 100 * naming / (naming + finding)
        print(
            f"\n128k tokens, pages of {page_tokens}, {num_cached} chunks cached: keys "
            f"{naming:.2f} ms ({share:.0f} %), lookup {finding:.3f} ms ({100 - share:.0f} %); "
            f"a miss {1000 * missing:.1f} us"
        )
    store.close()


@pytest.mark.parametrize("page_tokens", [64, 16])
def test_acquire_and_release_512_chunks(benchmark: BenchmarkFixture, page_tokens: int) -> None:
    store = open_store(page_tokens, 2 * NUM_CHUNKS)
    keys = KeyChain(b"prompt", store.layout.step_tokens).extend(TOKENS)
    store.reserve(chunks_of(keys, store.layout.chunk_steps)).commit()

    def use() -> int:
        with store.acquire(keys) as lease:
            return lease.steps

    assert benchmark(use) == len(keys)
    store.close()


@pytest.mark.parametrize("page_tokens", [64, 16])
def test_reserve_and_commit_512_chunks_with_eviction(
    benchmark: BenchmarkFixture, page_tokens: int
) -> None:
    store = open_store(page_tokens, NUM_CHUNKS)
    steps = store.layout.chunk_steps
    prompts = [
        chunks_of(KeyChain(b"%d" % n, store.layout.step_tokens).extend(TOKENS), steps)
        for n in range(2)
    ]
    store.reserve(prompts[0]).commit()

    def turn() -> tuple[tuple[list[Chunk]], dict[str, object]]:
        prompts.reverse()
        return (prompts[0],), {}

    def renew(chunks: list[Chunk]) -> None:
        store.reserve(chunks).commit()

    benchmark.pedantic(renew, setup=turn, rounds=50)  # type: ignore[no-untyped-call]
    assert store.ram.num_idle == NUM_CHUNKS
    assert store.ram.evictions >= NUM_CHUNKS
    store.close()


@pytest.mark.parametrize("page_tokens", [64, 16])
def test_garbage_collection_with_chunks_indexed(
    benchmark: BenchmarkFixture, page_tokens: int
) -> None:
    num_cached = 100_000 if benchmark.enabled else 1_000
    gc.collect()
    before, objects = median_ms(gc.collect), len(gc.get_objects())
    store = open_store(page_tokens, num_cached)
    fill(store, num_cached)
    gc.collect()
    tracked = len(gc.get_objects()) - objects
    benchmark.pedantic(gc.collect, rounds=15)  # type: ignore[no-untyped-call]
    if benchmark.enabled:
        print(
            f"\ngc of generation 2: {before:.2f} ms before, {median_ms(gc.collect):.2f} ms with "
            f"{num_cached} chunks indexed (pages of {page_tokens}; {tracked} more objects tracked)"
        )
    assert tracked < num_cached // 10
    store.close()
