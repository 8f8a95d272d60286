"""lmc's own time on SGLang's scheduler thread, with SGLang's real cache and no model.

    pytest tests/integrations/test_bench_linker.py --benchmark-enable -s

The times are the linker's own counters, so waiting for SGLang is not in them. Targets: 1 ms a
request at 2k tokens, 5 ms at 128k, 50 us for a repeated miss.
"""

from __future__ import annotations

import pytest

from tests.integrations.harness import tokens

PARTS = ("arrival", "lookup", "load", "start_load", "offload", "commit")


def spent(harness) -> dict[str, float]:
    snapshot = harness.store.snapshot()
    return {part: snapshot.get(f"scheduler.{part}.seconds", 0.0) for part in PARTS}


@pytest.mark.parametrize("page", [64, 16])
@pytest.mark.parametrize("length", [2048, 131072])
def test_own_time_of_a_request(harness, benchmark, length, page):
    h = harness(page, size=140_800, LMC_RAM_GB="1")
    seeds = iter(range(1, 1000))
    rows = {"stored": [], "loaded": []}

    def request() -> None:
        ids = tokens(next(seeds), length)
        for name in rows:
            before = spent(h)
            h.run(ids)
            h.settle()
            after = spent(h)
            rows[name].append({part: after[part] - before[part] for part in PARTS})
            h.flush()

    benchmark.pedantic(request, rounds=3 if length > 10_000 else 20, warmup_rounds=1)
    for name, taken in rows.items():
        median = sorted(taken, key=lambda row: sum(row.values()))[len(taken) // 2]
        parts = ", ".join(f"{part} {1e3 * s:.3f}" for part, s in median.items())
        total = 1e3 * sum(median.values())
        benchmark.extra_info[name] = round(total, 3)
        print(f"\n{length} tokens, page {page}, {name}: {total:.3f} ms ({parts})")


def test_own_time_of_a_repeated_miss(harness, benchmark):
    h = harness(LMC_RAM_GB="0.2")
    req = h.arrive(tokens(1, 2048))
    h.match(req)
    before = h.store.snapshot()
    benchmark.pedantic(lambda: h.match(req), rounds=200)
    after = h.store.snapshot()
    calls = after["scheduler.lookup.calls"] - before["scheduler.lookup.calls"]
    us = 1e6 * (after["scheduler.lookup.seconds"] - before["scheduler.lookup.seconds"]) / calls
    benchmark.extra_info["us"] = round(us, 1)
    print(f"\na repeated miss: {us:.1f} us")


def test_own_time_of_a_step_with_nothing_to_do(harness, benchmark):
    h = harness()
    benchmark(h.linker.num_completed_offloads)
    steps = h.store.snapshot()
    us = 1e6 * steps["scheduler.step.seconds"] / steps["scheduler.step.calls"]
    print(f"\nan idle step: {us:.1f} us")
