"""SGLang's real cache over a linker that copies by a GPU's driver, the fake one: order, layers, and
what becomes of requests, pages and chunks while a copy is under way, or never ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.integrations.gpu import NOTHING, Gpu
from tests.integrations.harness import DIM, HEADS, LAYERS, LAYOUTS, tokens
from tests.integrations.test_linker import digests_of
from tests.kernels.fake import VENDORS, Fake, build_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lmc.kernels import Vendor

IDS = tokens(1, 1000)  # 960 of them in whole pages, 15 pages


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Vendor, Path]:
    return build_all(tmp_path_factory.mktemp("drivers"))


@pytest.fixture(params=VENDORS, ids=str)
def fake(request: pytest.FixtureRequest, libraries: dict[Vendor, Path]) -> Fake:
    return Fake(request.param, libraries[request.param])


@pytest.fixture(params=[True, False], ids=["overlap", "in turn"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[None, 0], ids=["reaching", "staged"])
def gpu(request: pytest.FixtureRequest, fake: Fake, overlap: bool) -> Iterator[Gpu]:
    """Named before `harness`, so that it ends after it: nothing is left on the device then."""
    gpu = Gpu(fake, overlap=overlap, staged_from=request.param)
    yield gpu
    gpu.end()
    assert fake.left == 0


@pytest.fixture
def engine(gpu: Gpu, harness: Callable[..., Any]) -> Any:
    return harness(gpu=gpu)


def stored(h: Any, ids: Any = IDS) -> Any:
    """It has stored a prompt, and its pages are wiped and free."""
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    return h


def held(h: Any) -> bool:
    h.store.ram.check()
    return any(h.store.ram._pins)


def until_let_go(h: Any) -> None:
    for _ in range(300):
        h.step()
        if not held(h):
            return
    raise AssertionError("chunks are held for ever")


# --- order and bytes


def test_what_was_computed_comes_back(engine, gpu):
    stored(engine)
    assert gpu.fake.count("pinned") == engine.store.arena.num_slots * engine.store.arena.slot_bytes
    assert engine.run(IDS) == 960
    assert engine.run(IDS[:500] + tokens(2, 600)) == 448, "in the tree"
    engine.settle()
    engine.flush()
    assert engine.run(IDS[:500] + tokens(2, 600)) == 1088
    engine.finish()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(gpu, harness, layout):
    h = stored(harness(gpu=gpu, layout=layout))
    assert h.run(IDS) == 960
    h.finish()


def test_pages_that_a_running_forward_still_writes_are_loaded_after_it(engine, gpu):
    """SGLang frees the pages of a request that is over while a forward that was begun before has it
    in its batch.
    """
    h = stored(engine)
    everything = h.alloc.alloc(h.alloc.available_size())
    late = torch.full((len(everything), HEADS, DIM), -1.0)
    for buffer in h.buffers:
        h.write(buffer, everything, late)
    h.alloc.free(everything)
    assert h.run(IDS) == 960
    h.finish()


def test_a_layer_is_there_once_the_forward_waits_for_it_and_no_other(engine, gpu):
    h = stored(engine)
    _, _, loaded, index = h.begin(IDS)
    counter = h.linker.layer_done_counter
    counter.set_consumer(index)
    want = h.expected(IDS)

    def there() -> list[bool]:
        found = [buffer[loaded] for buffer in h.pool.k_buffer]
        return [torch.equal(k, want[i][: len(loaded)]) for i, k in enumerate(found)]

    gpu.finish()
    assert there() == [False] * LAYERS, "nobody waited"
    for layer in (0, 2, 3):
        with gpu.forward():
            counter.wait_until(layer)
        gpu.finish()
        assert there() == [i <= layer for i in range(LAYERS)]
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)


def test_a_forward_that_loads_nothing_waits_for_nothing(engine, gpu):
    h = stored(engine)
    _, _, loaded, _ = h.begin(IDS)
    h.forward(tokens(2, 128), NOTHING, h.alloc.alloc(128))  # of another batch
    h.finish()
    assert not any(buffer[loaded].any() for buffer in h.buffers)
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)


# --- requests that go away


def test_pages_of_a_request_aborted_while_it_loads_are_reused_after_the_load(engine, gpu):
    """No forward waits for a layer; what is written into the pages next stays there."""
    h = stored(engine)
    req, _, loaded, _ = h.begin(IDS)
    h.cache.linker.release_request(req.rid)
    assert held(h)
    assert h.cache.linker.finish_loads() == []
    assert held(h), "its chunks are still read"
    h.alloc.free(loaded)
    other = tokens(7, 960)
    h.forward(other, NOTHING, loaded)
    h.finish()
    until_let_go(h)
    h.check(other, loaded)


def test_a_request_aborted_while_it_stores(engine, gpu):
    h = engine
    h.run(IDS)
    h.cache.linker.release_request("r1")
    free = h.alloc.available_size()
    h.evict(4096)
    assert h.alloc.available_size() == free, "its pages are locked until they are copied"
    h.settle()
    h.flush()
    assert h.run(IDS) == 960
    h.finish()


def test_a_flush_while_loads_land_waits_for_them(engine, gpu):
    h = stored(engine)
    h.begin(IDS)
    assert h.cache.linker.finish_loads() == []
    h.cache.reset()
    assert not held(h)
    h.alloc.clear()
    assert h.run(IDS) == 960
    h.finish()


# --- what goes wrong


@pytest.mark.parametrize("call", ["launch", "copy"])
@pytest.mark.parametrize("fatal", [1, 2, 4])
def test_a_load_with_a_call_that_fails_is_never_served(engine, gpu, call, fatal, caplog):
    """Its request ends, nobody else's; the pages may hold anything and are not looked at again."""
    h = stored(engine)
    name = {"launch": "launches", "copy": "copies"}[call]
    gpu.fake.set(f"fail_{call}", gpu.fake.count(name) + fatal)
    req, _, loaded, index = h.begin(IDS)
    h.forward(IDS, NOTHING, h.alloc.alloc(64), index)
    assert h.cache.linker.finish_loads() == [req.rid]
    assert "lmc could not load KV" in caplog.text
    h.alloc.free(loaded)
    gpu.fake.set(f"fail_{call}", 0)
    assert h.run(IDS) == 960, "its chunks are as good as before"
    h.finish()
    until_let_go(h)


@pytest.mark.parametrize("call", ["launch", "copy"])
def test_a_store_with_a_call_that_fails_is_not_kept(engine, gpu, call, caplog):
    h = engine
    name = {"launch": "launches", "copy": "copies"}[call]
    h.run(tokens(3, 200))  # the pool's table is there
    h.settle()
    slots = h.alloc.alloc(960)
    h.forward(IDS, NOTHING, slots)
    gpu.fake.set(f"fail_{call}", gpu.fake.count(name) + 1)
    h.insert(IDS, slots)
    h.settle()
    assert h.store.snapshot()["offload.lost"] == 1
    assert "lmc could not store KV" in caplog.text
    gpu.fake.set(f"fail_{call}", 0)
    h.flush()
    assert h.run(IDS) == 0
    h.settle()
    h.flush()
    assert h.run(IDS) == 960
    h.finish()


def test_a_store_that_never_ends_is_held_and_holds_nobody_up(engine, gpu):
    h = engine
    gpu.fake.set("stuck", 1)
    h.run(IDS)
    gpu.fake.set("stuck", 0)
    h.finish()
    free = h.alloc.available_size()
    for _ in range(20):
        h.step()
    assert len(h.cache.linker.pending_offloads) == 1
    h.evict(4096)
    assert h.alloc.available_size() == free, "its pages are locked"
    assert h.store.lookup(h.linker.lanes[0].steps(digests_of(IDS, 64), 0)[1]) == 0, "not there yet"
    assert h.run(tokens(2, 500)) == 0
    gpu.fake.set("unstick", 1)
    h.settle()
    h.flush()
    assert h.run(IDS) == 960
    h.finish()


def test_a_load_that_never_ends_is_held_and_holds_nobody_up(engine, gpu):
    h = stored(engine)
    gpu.fake.set("stuck", 1)
    assert h.run(IDS) == 960
    gpu.fake.set("stuck", 0)
    h.finish()
    for seed in range(5):
        assert h.run(tokens(10 + seed, 500)) == 0
        assert held(h), "its chunks may still be read"
    h.finish()
    gpu.fake.set("unstick", 1)
    until_let_go(h)
