"""What background copies cost a busy torch matmul beside them, against a thread that does nothing
but memcpy: copies should cost no more than the memory bandwidth they take.

Off by default: a plain run goes through each case once, small. Measure with
    pytest tests/bench/test_bench_beside.py --benchmark-enable -s
Times decide no test.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from lmc.transfer import PagedPool, Piece, ThreadCopier, Transfer, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

PLANES, PAGES, PAGE_BYTES = 64, 16, 32 << 10
CHUNK_BYTES = PLANES * PAGES * PAGE_BYTES
NUM_CHUNKS = 8
SIZE = 768  # of a matrix: three fit the cache, so the matmul hangs on the processor


class Copies:
    """One chunk after the other, of a pool in random order, as long as it runs: by lmc's copier
    (`store`, `load`), or by memcpy.
    """

    def __init__(self) -> None:
        pages = NUM_CHUNKS * PAGES
        self.pool = PagedPool(
            [torch.ones(pages, PAGE_BYTES, dtype=torch.uint8) for _ in range(PLANES)]
        )
        self.chunks = torch.ones(NUM_CHUNKS, CHUNK_BYTES, dtype=torch.uint8)
        order = torch.randperm(pages).view(NUM_CHUNKS, PAGES)
        self.transfers = [
            Transfer(self.pool, ids, [Piece(chunk.data_ptr(), PAGES, 0, PAGES)])
            for ids, chunk in zip(order, self.chunks, strict=True)
        ]
        self.copier = ThreadCopier(resolve("auto", torch.device("cpu")))

    def nothing(self, n: int) -> int:
        time.sleep(0.01)
        return 0

    def store(self, n: int) -> int:
        self.copier.store([self.transfers[n % NUM_CHUNKS]]).wait()
        return CHUNK_BYTES

    def load(self, n: int) -> int:
        self.copier.load([self.transfers[n % NUM_CHUNKS]]).wait()
        return CHUNK_BYTES

    def memcpy(self, n: int) -> int:
        to, source = (self.chunks[k % NUM_CHUNKS].data_ptr() for k in (n, n + 1))
        ctypes.memmove(to, source, CHUNK_BYTES)
        return CHUNK_BYTES

    @contextmanager
    def running(self, copy: Callable[[int], int]) -> Iterator[list[float]]:
        """GB/s, once it is over."""
        stop, rate = threading.Event(), list[float]()

        def work() -> None:
            begin = time.perf_counter()
            done = sum(
                copy(n) for n in itertools.takewhile(lambda _: not stop.is_set(), itertools.count())
            )
            rate.append(done / (time.perf_counter() - begin) / 1e9)

        thread = threading.Thread(target=work)
        thread.start()
        yield rate
        stop.set()
        thread.join()


def matmul_ms(seconds: float) -> float:
    """The median of as many matmuls as fit the time."""
    a, b, out = (torch.ones(SIZE, SIZE) for _ in range(3))
    taken = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_bench_matmul_beside_copies(benchmark: BenchmarkFixture) -> None:
    rounds, seconds = (10, 0.5) if benchmark.enabled else (1, 0.0)
    copies = Copies()
    took, rates = defaultdict(list), defaultdict(list)

    def one_round() -> None:
        for name in ("nothing", "memcpy", "store", "load"):
            with copies.running(getattr(copies, name)) as rate:
                took[name].append(matmul_ms(seconds))
            rates[name] += rate

    benchmark.pedantic(one_round, rounds=rounds)
    copies.copier.close()
    alone = statistics.median(took["nothing"])
    for name in ("memcpy", "store", "load"):
        slower, rate = statistics.median(took[name]) / alone, statistics.median(rates[name])
        benchmark.extra_info[name] = f"{slower:.2f}x at {rate:.1f} GB/s"
        print(f"\nmatmul beside {name}: {slower:.2f}x of {alone:.2f} ms at {rate:.1f} GB/s", end="")
