"""Gather and scatter against memcpy of the same bytes, as `python -m lmc bench transfer` does it.

Off by default: a plain run moves each case once. Measure with
    pytest tests/bench/test_bench_transfer.py --benchmark-enable -s
Times decide no test.
"""

import pytest

from lmc.cli import bench, bench_memory


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
@pytest.mark.parametrize("model", bench_memory.MODELS, ids=lambda model: model.name)
def test_bench_transfer(benchmark, model: bench_memory.Model, page_tokens: int) -> None:
    rounds, pool_chunks = (15, bench_memory.POOL_CHUNKS) if benchmark.enabled else (1, 2)
    rows = benchmark.pedantic(
        lambda: list(bench_memory.transfer(rounds, (model,), (page_tokens,), pool_chunks))
    )
    for row in rows:
        benchmark.extra_info[row.name] = f"{row.ratio:.2f}x of {row.against}"
        print("\n" + bench.line(row), end="")
