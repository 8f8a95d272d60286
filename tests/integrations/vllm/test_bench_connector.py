"""The connector at the size of a large model, on any machine: vLLM's engine core, a KV cache of the
model's shape, no weights and no forward.

    pytest tests/integrations/vllm/test_bench_connector.py --benchmark-enable -s

Times are those of lmc's calls alone, on the thread of vLLM's scheduler (and, in one process, of its
worker). Targets: 1 ms a request of 2k tokens on the scheduler's side, 50 us for a repeated poll.
Rates are wall clock beside a plain copy of as many bytes by one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.integrations.vllm.fake import full, mamba, prompt, sliding

LLAMA_3_8B = full(32, heads=8, head=128)
"""32 layers, 8 KV heads, 128 dimensions, 16 tokens a block: 2 MiB a block of all layers."""
SMALL = full(2, heads=8, head=128)
"""Instead of it where nothing is measured."""
SCHEDULER = ("arrived", "match", "allocated", "step", "finished", "update", "poll")
WORKER = ("before_forward", "start_loads", "start_stores", "take_loads", "take_report")
CASES = {
    "Llama-3-8B": (LLAMA_3_8B, {}),
    "windows": (sliding(2, 1024), {}),
    "states": (mamba(2, "align"), {"block": 64, "mamba_mode": "align"}),
}


class Clock:
    """Seconds and calls of an object's methods; those within another count once."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = False
        for name in names:
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            if self._inside:
                return call(*args)
            self._inside, begin = True, time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[name] += time.perf_counter() - begin
                self._inside = False

        return timed

    def take(self) -> Counter[str]:
        taken, self.seconds = self.seconds, Counter()
        return taken


class Rates:
    """Wall time of the copies behind lmc's transfer backend."""

    def __init__(self, copies: Any) -> None:
        self.seconds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        for name in ("gather", "scatter"):
            setattr(copies, name, self._timed(name, getattr(copies, name)))

    def _timed(self, name: str, call: Any) -> Any:
        def timed(transfer: Any, planes: range) -> None:
            begin = time.perf_counter()
            call(transfer, planes)
            self.seconds[name] += time.perf_counter() - begin
            self.bytes[name] += len(transfer.page_ids) * sum(transfer.pool.page_bytes)

        return timed

    def take(self, name: str) -> float:
        """GB/s since the last call."""
        rate = self.bytes.pop(name) / self.seconds.pop(name) / 1e9
        return float(rate)


def bench_engine(engine: Any, specs: Any, tokens: int, ram_gb: float, **options: Any) -> Any:
    block = options.get("block", 16)
    one = engine(
        specs,
        blocks=(2 if len(specs) > 2 else 3) * (tokens // block) + 300,
        max_len=tokens + 1024,
        budget=tokens + 1024,
        LMC_RAM_GB=str(ram_gb),
        LMC_CHUNK_TOKENS="256",
        **options,
    )
    one.moves_bytes = False
    return one


def forget(one: Any) -> None:
    assert one.scheduler.reset_prefix_cache()


def size(one: Any) -> int:
    """Bytes of a token."""
    layout = one.lmc.lanes[0].layout
    return int(layout.page_bytes // layout.page_tokens)


def memcpy_rate(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    best = 1e9
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return num_bytes / best / 1e9


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("Llama-3-8B", 2048),
        ("full", 2048),
        ("full", 32768),
        ("full", 131072),
        ("windows", 2048),
        ("windows", 32768),
        ("states", 2048),
    ],
)
def test_own_time_of_a_request(engine, benchmark, kind, length):
    specs, options = CASES.get(kind, (full(2), {}))
    specs = specs if benchmark.enabled or kind != "Llama-3-8B" else SMALL
    one = bench_engine(engine, specs, length, 0.7 if kind == "Llama-3-8B" else 0.5, **options)
    clocks = {"scheduler": Clock(one.lmc, SCHEDULER)}
    clocks["worker"] = Clock(one.workers[0].connector.worker, WORKER)
    rows: dict[str, list[dict[str, Counter[str]]]] = {"stored": [], "loaded": []}
    seeds = iter(range(1, 1000))

    def request() -> None:
        ids = prompt(next(seeds), length)
        for row in rows.values():
            for clock in clocks.values():
                clock.take()
            one.finish(one.ask(ids, 2))
            one.settle()
            row.append({side: clock.take() for side, clock in clocks.items()})
            forget(one)

    benchmark.pedantic(request, rounds=3 if length > 10_000 else 15, warmup_rounds=1)
    assert one.count("tokens.loaded") >= length - 64
    for name, taken in rows.items():
        for side in clocks:
            median = sorted((row[side] for row in taken), key=lambda c: c.total())[len(taken) // 2]
            parts = ", ".join(f"{part} {1e3 * s:.3f}" for part, s in median.most_common())
            benchmark.extra_info[f"{name} {side}"] = round(1e3 * median.total(), 3)
            total = f"{1e3 * median.total():.3f} ms"
            print(f"\n{kind}, {length} tokens, {name}, {side}: {total} ({parts})")


def test_own_time_of_a_repeated_poll(engine, benchmark):
    """A request that waits for blocks is asked for in every step."""
    one = bench_engine(engine, full(2), 2048, 0.5)
    one.run([prompt(1, 2048)])
    forget(one)
    request = one.asked[one.ask(prompt(1, 2048))][0]
    assert one.lmc.match(request, 0) == (2048, True)
    begin, calls = time.perf_counter(), 2000
    for _ in range(calls):
        one.lmc.match(request, 0)
    us = 1e6 * (time.perf_counter() - begin) / calls
    benchmark(one.lmc.match, request, 0)
    benchmark.extra_info["us"] = round(us, 1)
    print(f"\na repeated poll: {us:.1f} us")


def test_own_time_of_a_poll_that_misses(engine, benchmark):
    one = bench_engine(engine, full(2), 2048, 0.5)
    request = one.asked[one.ask(prompt(1, 2048))][0]
    one.lmc.match(request, 0)
    benchmark(one.lmc.match, request, 0)
    begin, calls = time.perf_counter(), 2000
    for _ in range(calls):
        one.lmc.match(request, 0)
    print(f"\na repeated miss: {1e6 * (time.perf_counter() - begin) / calls:.1f} us")


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC"])
def test_rate_of_copies(engine, benchmark, layout):
    specs = LLAMA_3_8B if benchmark.enabled else SMALL
    one = bench_engine(engine, specs, 2048, 0.7, layout=layout)
    rates = Rates(one.copies[0])
    found: dict[str, list[float]] = {"gather": [], "scatter": []}

    def request(seed: int = 0) -> None:
        ids = prompt(seed + len(found["gather"]), 2048)
        for name, list_ in found.items():
            one.finish(one.ask(ids))
            one.settle()
            forget(one)
            list_.append(rates.take(name))

    benchmark.pedantic(request, rounds=6, warmup_rounds=1)
    plain = memcpy_rate(2048 * size(one))
    for name, each in found.items():
        rate = sorted(each)[len(each) // 2]
        benchmark.extra_info[name] = round(rate, 2)
        print(
            f"\n{layout}, {name}: {rate:.2f} GB/s, {rate / plain:.2f} of a plain copy ({plain:.2f})"
        )


def test_eight_loads_at_once(engine, benchmark):
    """Eight requests of 1k tokens, 134 MB each."""
    one = bench_engine(engine, LLAMA_3_8B if benchmark.enabled else SMALL, 8 * 1024, 1.3)
    prompts = [prompt(seed, 1024) for seed in range(8)]
    one.run(prompts)
    clock = Clock(one.lmc, SCHEDULER)
    rows = []

    def load() -> None:
        forget(one)
        clock.take()
        begin = time.perf_counter()
        names = [one.ask(ids) for ids in prompts]
        one.finish(*names)
        rows.append((time.perf_counter() - begin, clock.take().total()))
        assert max(one.computed[name] for name in names) == 1
        one.settle()

    benchmark.pedantic(load, rounds=5, warmup_rounds=1)
    wall, own = sorted(rows)[len(rows) // 2]
    gigabytes = 8 * 1024 * size(one) / 1e9
    print(
        f"\n8 loads at once: {1e3 * wall:.0f} ms, {gigabytes / wall:.2f} GB/s; "
        f"{1e3 * own / 8:.3f} ms a request on the scheduler's side"
    )


def first_forwards(one: Any) -> dict[str, float]:
    """When each request was first computed on, filled in as that happens."""
    times: dict[str, float] = {}
    worker = one.workers[0]
    execute = worker.execute

    def timed(output: Any) -> Any:
        for name in output.num_scheduled_tokens:
            times.setdefault(name, time.perf_counter())
        return execute(output)

    worker.execute = timed
    return times


@pytest.mark.parametrize("length", [2040, 2048])
def test_a_crowd_with_one_prompt_waits_for_one_load(engine, benchmark, length):
    """The slowest of 32 requests for the same 2k tokens, from the first step to its KV being there,
    beside one that asks alone. Target: not twice as long. Of whole blocks vLLM itself finds all but
    the last, which the others compute.
    """
    specs, crowd = LLAMA_3_8B if benchmark.enabled else SMALL, 32
    one = bench_engine(engine, specs, 2048, 0.7, seqs=crowd)
    ids = prompt(1, length)
    one.run([ids])
    times = first_forwards(one)
    waits: dict[int, list[float]] = {1: [], crowd: []}

    def ask() -> None:
        for number, taken in waits.items():
            forget(one)
            loaded = one.count("tokens.loaded")
            names = [one.ask(ids) for _ in range(number)]
            begin = time.perf_counter()
            one.until(lambda names=names: times.keys() >= set(names))
            taken.append(max(times[name] for name in names) - begin)
            one.finish(*names)
            one.settle()
            loaded = one.count("tokens.loaded") - loaded
            assert loaded == length // 16 * 16

    benchmark.pedantic(ask, rounds=9, warmup_rounds=1)
    alone, slowest = (median(taken) for taken in waits.values())
    benchmark.extra_info["slowest of a crowd / alone"] = round(slowest / alone, 2)
    print(
        f"\n{length} tokens, one alone: {1e3 * alone:.0f} ms; "
        f"the slowest of {crowd}: {1e3 * slowest:.0f} ms, {slowest / alone:.2f} times as long"
    )
