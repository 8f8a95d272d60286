"""SGLang's real cache over a linker that copies by a GPU's driver, the fake one: order, layers, and
what becomes of requests, pages and chunks while a copy is under way, or never ends. Windows, states
and drafts have pages and layers of their own.
"""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from tests.integrations.gpu import Gpu
from tests.integrations.harness import DRAFT, LAYOUTS, Request, Turn, tokens
from tests.integrations.models import STATES
from tests.integrations.test_linker import digests_of
from tests.integrations.test_models import MODELS
from tests.kernels.fake import VENDORS, Fake, build_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lmc.kernels import Vendor

IDS = tokens(1, 1000)  # 960 of them in whole pages, 15 pages
SEVERAL = ("swa", "mamba", "swa-mamba", "mla-eagle-draft")
"""Models with more than one pool, and one with a draft model's KV."""
LATE = 0xA5


class Way(NamedTuple):
    vendor: Vendor
    overlap: bool
    staged: bool

    def __str__(self) -> str:
        overlap = "overlap" if self.overlap else "in turn"
        return f"{self.vendor}-{overlap}-{'staged' if self.staged else 'reaching'}"


WAYS = [Way(*way) for way in product(VENDORS, (True, False), (True, False))]
SOME = [Way(vendor, overlap=True, staged=vendor == WAYS[0].vendor) for vendor in VENDORS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Plain attention in all ways, and other models in some."""
    names = metafunc.fixturenames
    if "engine" in names:
        cases = [("mha", way) for way in WAYS] + list(product(SEVERAL, SOME))
        ids = [f"{model}-{way}" for model, way in cases]
        metafunc.parametrize(("engine", "gpu"), cases, indirect=True, ids=ids)
    elif "gpu" in names:
        metafunc.parametrize("gpu", SOME if "model" in names else WAYS, indirect=True, ids=str)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Vendor, Path]:
    return build_all(tmp_path_factory.mktemp("drivers"))


@pytest.fixture
def gpu(request: pytest.FixtureRequest, libraries: dict[Vendor, Path]) -> Iterator[Gpu]:
    """Named before `harness`, so that it ends after it: nothing is left on the device then."""
    vendor, overlap, staged = request.param
    fake = Fake(vendor, libraries[vendor])
    gpu = Gpu(fake, overlap=overlap, staged_from=0 if staged else None)
    yield gpu
    gpu.end()
    assert fake.left == 0


@pytest.fixture
def engine(request: pytest.FixtureRequest, gpu: Gpu, harness: Callable[..., Any]) -> Any:
    return harness(gpu=gpu, model_kind="" if request.param == "mha" else request.param)


def stored(h: Any, ids: Any = IDS) -> Any:
    """It has stored a prompt, and its pages are wiped and free."""
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    return h


def other(ids: Any) -> Turn:
    """A request whose forward reads nothing."""
    return Turn(ids, Request("other", ids))


def held(h: Any) -> bool:
    for lane in h.linker.lanes:
        lane.store.ram.check()
    return any(any(lane.store.ram._pins) for lane in h.linker.lanes)


def until_let_go(h: Any) -> None:
    for _ in range(300):
        h.step()
        if not held(h):
            return
    raise AssertionError("chunks are held for ever")


def arrived(h: Any, turn: Turn) -> set[int]:
    """The layers of which all that a forward would read is there, and none of which only a part
    is.
    """
    there: dict[int, set[bool]] = {}
    for rows, slots, hashes in h.reads(turn):
        there.setdefault(rows.layer, set()).add(rows.holds(slots, hashes))
    assert all(len(found) == 1 for found in there.values()), "a part of a layer"
    return {layer for layer, found in there.items() if found == {True}}


def layers_of(h: Any, turn: Turn) -> set[int]:
    return {rows.layer for rows, _, _ in h.reads(turn)}


def write_everywhere(h: Any, value: int) -> None:
    """A forward writes into all pages there are, windows and states included."""
    with h.device.forward():
        for rows in h.all_rows:
            image = torch.full_like(rows.bytes, value)
            h.device.write(rows, torch.arange(len(image)), image)


def evict_all(h: Any) -> list[int]:
    """What is free then."""
    h.cache.evict(EvictParams(h.size, swa_num_tokens=h.size, mamba_num=STATES))
    return [allocator.available_size() for allocator in h.allocators]


def calls_of(gpu: Gpu, call: str) -> int:
    return gpu.fake.count({"launch": "launches", "copy": "copies"}[call])


def some(calls: int, most: int = 6) -> list[int]:
    """Which of so many calls fail, the last one included."""
    return [*range(1, calls, -(-calls // most)), calls]


# --- order and bytes


@pytest.mark.parametrize("model", MODELS)
def test_every_model_comes_back(gpu, harness, model):
    h = stored(harness(gpu=gpu, model_kind=model))
    arenas = [lane.store.arena for lane in h.linker.lanes]
    assert gpu.fake.count("pinned") == sum(a.num_slots * a.slot_bytes for a in arenas)
    longer = IDS + tokens(2, 300)
    assert h.run(IDS) == 960
    gpu.finish()  # before anybody looks at the load
    assert h.run(longer) == 960, "in the tree"
    h.settle()
    h.flush()
    assert h.run(longer) == 1280
    gpu.finish()


def test_a_prompt_that_diverges_comes_back(gpu, harness):
    h = stored(harness(gpu=gpu))
    assert h.run(IDS) == 960
    assert h.run(IDS[:500] + tokens(2, 600)) == 448, "in the tree"
    h.settle()
    h.flush()
    assert h.run(IDS[:500] + tokens(2, 600)) == 1088
    gpu.finish()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(gpu, harness, layout):
    h = stored(harness(gpu=gpu, layout=layout))
    assert h.run(IDS) == 960
    gpu.finish()


def test_pages_that_a_running_forward_still_writes_are_loaded_after_it(engine, gpu):
    """SGLang frees what a request had when it is over, while a forward that was begun before has it
    in its batch. Nobody waits for this load, so nothing else puts it behind that forward.
    """
    h = stored(engine)
    write_everywhere(h, LATE)
    turn = h.begin(IDS)
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)
    gpu.finish()
    assert arrived(h, turn) == layers_of(h, turn)


def test_a_layer_is_there_once_the_forward_waits_for_it_and_no_other(engine, gpu):
    """A draft model's KV comes with the last layer that reads these pages."""
    h = stored(engine)
    turn = h.begin(IDS)
    gpu.finish()
    assert arrived(h, turn) == set(), "nobody waited"
    h.linker.layer_done_counter.set_consumer(turn.index)
    layers = sorted(layers_of(h, turn) - {DRAFT})
    for layer in layers[::2] + layers[-1:]:
        with gpu.forward():
            h.wait_for(layer)
        gpu.finish()
        assert arrived(h, turn) - {DRAFT} == {one for one in layers if one <= layer}
    assert arrived(h, turn) == layers_of(h, turn)
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)


def test_who_waits_once_finds_everything(engine, gpu):
    """A forward in one graph, or a draft model fused with the model: they wait for the last layer
    of the model.
    """
    h = stored(engine)
    turn, counter = h.begin(IDS), h.linker.layer_done_counter
    with gpu.forward():
        counter.events[turn.index].wait(counter.num_layers - 1)
    gpu.finish()
    assert arrived(h, turn) == layers_of(h, turn)
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)


def test_a_forward_that_loads_nothing_waits_for_nothing(engine, gpu):
    h = stored(engine)
    turn = h.begin(IDS)
    h.forward(other(tokens(2, 128)), h.alloc_tokens(128))  # of another batch
    gpu.finish()
    assert not any(
        rows.bytes[rows.at(slots, rows.values(hashes))[0]].any()
        for rows, slots, hashes in h.reads(turn)
    )
    assert h.cache.linker.finish_loads() == []
    until_let_go(h)


# --- requests that go away


def test_pages_of_a_request_aborted_while_it_loads_are_reused_after_the_load(engine, gpu):
    """No forward waits for a layer; what is written into the pages next stays there."""
    h = stored(engine)
    turn = h.begin(IDS)
    h.cache.linker.release_request(turn.req.rid)
    assert held(h)
    assert h.cache.linker.finish_loads() == []
    assert held(h), "its chunks are still read"
    h.drop(turn)
    write_everywhere(h, LATE)
    gpu.finish()
    until_let_go(h)
    assert all(bool((rows.bytes == LATE).all()) for rows in h.all_rows)


@pytest.mark.parametrize("model", ["swa"])
def test_what_a_store_reads_of_a_window_before_its_node_stays_until_it_is_over(gpu, harness, model):
    """SGLang locks the window at the end of a node; its first chunk may begin before the node."""
    h = harness(1, gpu=gpu, model_kind=model)
    ids = tokens(1, 1000)  # ends in a chunk
    h.run(ids)
    h.settle()
    ids = ids + tokens(2, 400)
    h.run(ids)
    evict_all(h)
    windows = h.alloc.swa_attn_allocator
    taken = windows.alloc(windows.available_size())
    with gpu.forward():
        for rows in h.window_rows:
            gpu.write(rows, taken, torch.full_like(rows.bytes[taken], LATE))
    h.flush()
    assert h.run(ids[:1100]) == 1099
    gpu.finish()


def test_a_request_aborted_while_it_stores(engine, gpu):
    h = engine
    h.run(IDS)
    h.cache.linker.release_request("r1")
    free = [allocator.available_size() for allocator in h.allocators]
    assert evict_all(h) == free, "its pages are locked until they are copied"
    h.settle()
    assert evict_all(h) != free
    h.flush()
    assert h.run(IDS) == 960
    gpu.finish()


def test_a_flush_while_loads_land_waits_for_them(engine, gpu):
    h = stored(engine)
    h.begin(IDS)
    assert h.cache.linker.finish_loads() == []
    h.reset()
    assert not held(h)
    assert h.run(IDS) == 960
    gpu.finish()


# --- what goes wrong


@pytest.mark.parametrize("call", ["launch", "copy"])
def test_a_load_with_a_call_that_fails_is_never_served(engine, gpu, call, caplog):
    """Its request ends, nobody else's; the pages may hold anything and are not looked at again."""
    h = stored(engine)
    before = calls_of(gpu, call)
    h.drop(h.begin(IDS))
    calls = calls_of(gpu, call) - before
    assert h.cache.linker.finish_loads() == []
    for fatal in some(calls):
        gpu.fake.set(f"fail_{call}", calls_of(gpu, call) + fatal)
        turn = h.begin(IDS)
        assert len(turn.loaded) == 960, "its chunks are as good as before"
        rest = h.alloc_tokens(64)
        h.forward(Turn(IDS, turn.req, index=turn.index), rest)
        assert h.cache.linker.finish_loads() == [turn.req.rid]
        assert "lmc could not load KV" in caplog.text
        caplog.clear()
        h.drop(turn)
        h.alloc.free(rest)
    gpu.fake.set(f"fail_{call}", 0)
    assert h.run(IDS) == 960
    gpu.finish()
    until_let_go(h)


@pytest.mark.parametrize("call", ["launch", "copy"])
def test_a_store_with_a_call_that_fails_is_not_kept(engine, gpu, call, caplog):
    h = stored(engine, tokens(3, 1000))  # the tables of its pools are there

    def store(ids: Any, fatal: int) -> int:
        """Calls it took, one of which failed."""
        turn = h.begin(ids)
        rest = h.alloc_tokens(960)
        h.forward(turn, rest)
        before = calls_of(gpu, call)
        gpu.fake.set(f"fail_{call}", before + fatal if fatal else 0)
        h.keep(turn, rest)
        gpu.fake.set(f"fail_{call}", 0)
        calls = calls_of(gpu, call) - before
        h.settle()
        h.flush()
        return calls

    for lost, fatal in enumerate(some(store(IDS, 0)), 1):
        ids = tokens(10 + fatal, 1000)
        store(ids, fatal)
        assert h.store.snapshot()["offload.lost"] == lost
        assert "lmc could not store KV" in caplog.text
        caplog.clear()
        assert not held(h)
        assert h.run(ids) < 960, "a part that was stored by itself may be there"
        h.flush()
    assert h.run(IDS) == 960
    gpu.finish()


def test_a_store_that_never_ends_is_held_and_holds_nobody_up(engine, gpu):
    h = engine
    gpu.fake.set("stuck", 1)
    h.run(IDS)
    gpu.fake.set("stuck", 0)
    gpu.finish()
    free, stores = evict_all(h), len(h.cache.linker.pending_offloads)
    for _ in range(20):
        h.step()
    assert len(h.cache.linker.pending_offloads) == stores > 0
    assert evict_all(h) == free, "its pages are locked"
    assert h.store.lookup(h.linker.lanes[0].steps(digests_of(IDS, 64), 0)[1]) == 0, "not there yet"
    assert h.run(tokens(2, 500)) == 0
    gpu.fake.set("unstick", 1)
    h.settle()
    h.flush()
    assert h.run(IDS) == 960
    gpu.finish()


def test_a_load_that_never_ends_is_held_and_holds_nobody_up(engine, gpu):
    h = stored(engine)
    gpu.fake.set("stuck", 1)
    assert h.run(IDS) == 960
    gpu.fake.set("stuck", 0)
    gpu.finish()
    for seed in range(5):
        assert h.run(tokens(10 + seed, 500)) == 0
        assert held(h), "its chunks may still be read"
    gpu.finish()
    gpu.fake.set("unstick", 1)
    until_let_go(h)


# --- at random


@pytest.mark.parametrize("model", SEVERAL)
@pytest.mark.parametrize("seed", range(3))
def test_random_requests_under_pressure(gpu, harness, model, seed):
    """Forwards run now or much later, and copies when somebody looks, or waits."""
    rng = random.Random(seed)
    page = rng.choice([16, 64])
    h = harness(page, 4096, gpu=gpu, model_kind=model, LMC_RAM_GB="0.03")
    hits, asked = 0, [tokens(n, 600) for n in range(3)]
    for _ in range(50):
        ids = rng.choice(asked)[: rng.randrange(100, 1300)]
        ids = ids + tokens(rng.randrange(8), rng.randrange(1, 200))
        asked.append(ids)
        gpu.fake.set("patience", rng.choice([0, 1, 5]))
        match rng.randrange(8):
            case 0:
                turn = h.begin(ids)
                h.cache.linker.release_request(turn.req.rid)
                assert h.cache.linker.finish_loads() == []
                h.drop(turn)
            case 1:
                gpu.finish()
            case 2:
                h.settle()
            case 3:
                h.flush()
            case _:
                hits += h.run(ids)
    h.flush()
    for rid in list(h.linker._arrivals):
        h.linker.request_aborted(rid)
    until_let_go(h)
    assert hits > 0
