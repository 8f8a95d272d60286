"""Gather and scatter against memcpy of the same bytes in the same run, one thread, huge pages.

Off by default: a plain run moves each case once. Measure with
    pytest tests/bench/test_bench_transfer.py --benchmark-enable -s
Each round times memcpy, gather and scatter one after the other, so a busy machine slows all
three, each on a chunk that has left the cache, as the oldest slot of an arena has. The ratio of a
round is memcpy / op in CPU seconds; the table shows its median. Times decide no test.
"""

import ctypes
import itertools
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import pytest
import torch

from lmc.transfer import PagedPool, Piece, gather, resolve, scatter

HUGE = 2 << 20
CHUNK_TOKENS = 256
NUM_CHUNKS = 7
ROUNDS = 15


@dataclass(frozen=True)
class Model:
    name: str
    token_bytes: int
    planes: int


MODELS = [Model("SmolLM2-135M float32", 768, 60), Model("Llama-3-8B bf16", 2048, 64)]

table: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def printed_table() -> Iterator[None]:
    yield
    print("\n" + "\n".join(table))


def huge_memory(num_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(-1, num_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    return whole[begin : begin + num_bytes].fill_(7)


def cpu_seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_bench_transfer(benchmark, model: Model, page_tokens: int) -> None:
    pool_tokens = 16 * CHUNK_TOKENS if benchmark.enabled else 2 * CHUNK_TOKENS
    pages, row = CHUNK_TOKENS // page_tokens, page_tokens * model.token_bytes
    memory = huge_memory(model.planes * pool_tokens * model.token_bytes)
    pool = PagedPool(list(memory.view(model.planes, pool_tokens // page_tokens, row)))
    size = pool.chunk_bytes(pages)
    chunks = huge_memory(NUM_CHUNKS * size).view(NUM_CHUNKS, size)
    addresses = itertools.cycle([chunk.data_ptr() for chunk in chunks])
    backend = resolve("auto", pool.device)
    ratios: dict[str, list[float]] = {"gather": [], "scatter": []}
    rates: list[float] = []

    def one_round() -> None:
        page_ids = torch.randperm(pool.num_pages)[:pages]
        turn = len(rates)
        source = memory.data_ptr() + turn * 7919 * 4096 % (memory.numel() - size)
        target = next(addresses)
        memcpy = cpu_seconds(lambda: ctypes.memmove(target, source, size))
        for op in (gather, scatter):
            pieces = [Piece(next(addresses), pages, 0, pages)]
            took = cpu_seconds(lambda op=op, to=pieces: op(pool, page_ids, to, backend=backend))
            ratios[op.__name__].append(memcpy / took)
        rates.append(size / memcpy / 1e9)

    benchmark.pedantic(one_round, rounds=ROUNDS if benchmark.enabled else 1, warmup_rounds=2)
    found = {name: round(median(values[2:] or values), 2) for name, values in ratios.items()}
    benchmark.extra_info.update(backend=backend.name, memcpy_gbps=round(median(rates), 1), **found)
    table.append(
        f"{model.name:22s} page {page_tokens:3d}  {backend.name}  memcpy {median(rates):5.1f} GB/s"
        + "".join(f"  {name} {ratio:4.2f}x" for name, ratio in found.items())
    )
