"""Blocks that vLLM gives away while lmc copies them, requests that go at any moment, copies that
fail: nothing wrong is kept, nothing wrong is read, everything is given back.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
from vllm.v1.request import RequestStatus

from lmc_vllm.scheduler import _land
from tests.integrations.vllm.fake import answer, full, mamba, prompt, sliding
from tests.integrations.vllm.harness import SlowStores

if TYPE_CHECKING:
    from tests.integrations.vllm.harness import Engine

WAITING = RequestStatus.WAITING_FOR_REMOTE_KVS


def grow(one: Engine, count: int = 3) -> list[str]:
    """Requests that together do not fit: some are preempted."""
    names = [one.ask(prompt(seed, 150), 150) for seed in range(count)]
    one.until(lambda: any(one.asked[name][0].num_preemptions for name in names))
    return names


@pytest.mark.parametrize(
    ("specs", "blocks"), [(full(4), 40), (sliding(4, 100), 56)], ids=["full", "windows"]
)
@pytest.mark.parametrize("world", [{}, {"tp": 2}, {"overlap": True, "late": "all"}], ids=str)
def test_a_request_preempted_while_it_is_stored_is_stored_rightly(engine, specs, blocks, world):
    """Its blocks go to others at once: the step that gives them waits for the copy."""
    one = engine(specs, blocks=blocks, max_len=400, **world)
    slow = SlowStores(one)
    names = grow(one)
    one.finish(*names)
    slow.end()
    assert slow.fenced
    one.settle()
    prompts = [one.asked[name][0].prompt_token_ids for name in names]
    assert one.again(prompts) == [6, 6, 6]


def test_blocks_of_a_finished_request_are_kept_before_another_fills_them(engine):
    one = engine(blocks=26, max_len=400, budget=400)
    slow = SlowStores(one)
    first, second = prompt(1, 330), prompt(2, 330)
    names = [one.ask(first, 40), one.ask(second, 40)]  # the second waits for the first one's blocks
    one.finish(*names)
    slow.end()
    assert slow.fenced
    one.settle()
    assert one.again([[*first, *one.said[names[0]]]]) == [(330 + 40 - 1) % 16 + 1]
    assert one.again([second]) == [330 % 16]


@pytest.mark.parametrize("specs", [sliding(4, 100), mamba(4, "align")], ids=["windows", "states"])
def test_blocks_that_slide_out_while_they_are_stored_are_stored_rightly(engine, specs):
    is_state = "Mamba" in repr(specs)
    options: dict[str, Any] = {"block": 64, "mamba_mode": "align"} if is_state else {}
    one = engine(specs, blocks=300, budget=128, **options)
    slow = SlowStores(one)
    one.run([prompt(1, 700), prompt(2, 700)], 100)
    slow.end()
    assert slow.fenced
    assert max(one.again([prompt(1, 700), prompt(2, 700)])) <= 700 % options.get("block", 16)


def test_a_request_that_begins_again_is_stored_again(engine):
    one = engine(blocks=40, max_len=400)
    one.copies[0].failing_stores = 3
    names = grow(one)
    again = next(name for name in names if one.asked[name][0].num_preemptions)
    one.finish(*names)
    one.settle()
    assert one.count("store.failed") == 3
    assert one.again([one.asked[again][0].prompt_token_ids]) == [6]


@pytest.mark.parametrize(("length", "loaded"), [(320, 320), (336, 320), (352, 320), (368, 368)])
def test_a_small_rest_of_vllms_own_hit_is_computed(engine, length, loaded):
    """What vLLM holds of another prompt is all but 0, 16, 32 and 48 tokens of this one."""
    one = engine(blocks=300)
    ids = prompt(1, 320) + prompt(2, length - 320) + [5]
    one.run([ids])
    one.forget()
    one.run([[*ids[:320], 6]])
    before = one.count("tokens.loaded")
    one.run([ids])
    assert one.count("tokens.loaded") - before == loaded - 320


def test_what_is_being_loaded_stays_in_ram(engine):
    one = engine(LMC_RAM_GB="0.001", blocks=300)  # 27 chunks
    ids = prompt(1, 600)
    one.run([ids])
    one.forget()
    one.copies[0].may_load.clear()
    name = one.ask(ids)
    one.until(lambda: one.status(name) == WAITING)
    for seed in range(2, 6):
        one.finish(one.ask(prompt(seed, 600)))
    assert one.lmc.lanes[0].store.ram.evictions
    one.copies[0].may_load.set()
    one.finish(name)
    assert one.computed[name] == 600 % 16


def test_chunks_are_found_when_every_worker_has_copied_its_part(engine):
    one = engine(tp=2, caching=False)
    one.copies[1].may_store.clear()
    first = one.ask(prompt(1, 300), 100)
    one.until(lambda: one.copies[0].stored and len(one.said[first]) > 20)
    second = one.ask(prompt(1, 300), 100)
    one.until(lambda: len(one.said[second]) > 20)
    assert one.computed[second] >= 300
    one.copies[1].may_store.set()
    one.until(lambda: one.lmc.lanes[0].store.ram.live_steps())
    third = one.ask(prompt(1, 300))
    one.finish(first, second, third)
    assert one.computed[third] == 12


def test_a_store_that_takes_long_holds_nobody_up(engine):
    one = engine()
    one.copies[0].may_store.clear()
    name = one.ask(prompt(1, 300), 20)
    one.until(lambda: len(one.said[name]) == 19)
    assert one.lmc.busy
    one.copies[0].may_store.set()
    one.finish(name)


@pytest.mark.parametrize("world", [{}, {"tp": 2}, {"pp": 2, "late": "last stage"}], ids=str)
@pytest.mark.parametrize("moment", ["waiting", "loading", "loaded", "reading", "answering"])
def test_a_request_may_go_at_any_moment(engine, moment, world):
    one = engine(blocks=60, max_len=800, budget=200, **world)
    ids = prompt(1, 600)
    one.run([ids])
    one.forget()
    held = [copies for copies in one.copies if moment == "loading"]
    for copies in held:
        copies.may_load.clear()
    if moment == "waiting":
        busy = one.ask(prompt(3, 500), 50)
        one.step()
    name = one.ask(ids + prompt(2, 100), 50)
    moments = {
        "waiting": lambda: one.step() or True,
        "loading": lambda: one.status(name) == WAITING,
        "loaded": lambda: name in one.scheduler.finished_recving_kv_req_ids,
        "reading": lambda: one.status(name) == RequestStatus.RUNNING,
        "answering": lambda: len(one.said[name]) > 5,
    }
    one.until(moments[moment])
    one.abort(name)
    for _ in range(3):
        one.step()
    for copies in held:  # vLLM keeps its blocks until the workers are through with them
        assert name in one.scheduler.requests
        copies.may_load.set()
    one.settle()
    if moment == "waiting":
        one.check_answer(busy)
    one.check()
    assert one.again([ids]) == [600 % 16]


def test_a_load_that_fails_is_computed_and_not_tried_again(engine):
    one = engine(tp=2)
    ids = prompt(1, 300)
    one.run([ids], 3)
    one.copies[1].failing_loads = 1  # one worker's; the other has its part
    assert one.again([ids], 3) == [300]
    assert one.count("load.failed") == 1
    loaded = one.count("tokens.loaded")
    assert one.again([ids], 3) == [12]
    assert one.count("tokens.loaded") == loaded + 288


@pytest.mark.parametrize(
    ("specs", "options"),
    [(sliding(4, 100), {}), (mamba(4, "align"), {"block": 64, "mamba_mode": "align"})],
    ids=["windows", "states"],
)
def test_a_load_that_fails_is_computed_in_every_group(engine, specs, options):
    one = engine(specs, blocks=300, **options)
    one.run([prompt(1, 300)], 3)
    one.copies[0].failing_loads = 1
    assert one.again([prompt(1, 300)], 3) == [300]
    assert one.again([prompt(1, 300)], 3)[0] <= 44


def test_a_load_that_fails_for_a_request_that_is_gone_is_nobodys(engine):
    one = engine()
    one.run([prompt(1, 300)])
    one.forget()
    one.copies[0].may_load.clear()
    one.copies[0].failing_loads = 1
    name = one.ask(prompt(1, 300))
    one.until(lambda: one.status(name) == WAITING)
    one.abort(name)
    one.step()
    one.copies[0].may_load.set()
    one.settle()


def test_a_store_that_fails_keeps_nothing(engine):
    one = engine(tp=2)
    one.copies[0].failing_stores = 1
    one.run([prompt(1, 300)])
    assert one.count("store.failed") == 1
    assert one.again([prompt(1, 300)]) == [300]
    assert one.again([prompt(1, 300)]) == [12]


@pytest.mark.parametrize("length", [300, 512])
def test_identical_requests_load_once(engine, length):
    """32 at once: one loads, the others find its blocks; each loads its last block where vLLM
    cannot hand that on.
    """
    one = engine(seqs=32, blocks=200)
    ids = prompt(1, length)
    one.run([ids])
    before = one.copies[0].loaded
    assert max(one.again([ids] * 32)) <= 16
    assert one.copies[0].loaded - before <= length // 16 + 31


def test_nobody_waits_long_for_the_load_of_another(engine, monkeypatch):
    monkeypatch.setattr("lmc_vllm.scheduler.WAIT_FOR_TWIN_S", 0.05)
    one = engine()
    one.run([prompt(1, 300)])
    one.forget()
    one.copies[0].may_load.clear()
    names = [one.ask(prompt(1, 300)) for _ in range(3)]
    one.until(lambda: one.status(names[0]) == WAITING)
    assert one.status(names[1]) == RequestStatus.WAITING
    one.until(lambda: all(one.status(name) == WAITING for name in names))
    one.copies[0].may_load.set()
    one.finish(*names)


def test_who_waits_for_a_load_that_goes_away_loads_itself(engine):
    one = engine()
    one.run([prompt(1, 300)])
    one.forget()
    one.copies[0].may_load.clear()
    names = [one.ask(prompt(1, 300)) for _ in range(2)]
    one.until(lambda: one.status(names[0]) == WAITING)
    one.abort(names[0])
    one.until(lambda: one.status(names[1]) == WAITING, 1)
    one.copies[0].may_load.set()
    one.finish(names[1])


def test_a_promise_that_waits_for_blocks_is_answered_from_memory(engine):
    one = engine(blocks=40, max_len=600)
    ids = prompt(1, 500)
    one.run([ids])
    one.forget()
    busy = one.ask(prompt(2, 400), 60)
    one.until(lambda: one.said[busy])
    name = one.ask(ids)
    one.until(lambda: one.lmc._requests[name].promise)
    promise = one.lmc._requests[name].promise
    calls = one.count("scheduler.match.calls")
    for lane in one.lmc.lanes:
        lane.store.lookup = lane.store.acquire = None  # would raise
    for _ in range(20):
        one.step()
    assert one.lmc._requests[name].promise is promise
    assert one.count("scheduler.match.calls") >= calls + 20
    for lane in one.lmc.lanes:
        del lane.store.lookup, lane.store.acquire
    one.finish(busy, name)
    assert one.computed[name] == 500 % 16


def test_a_promise_is_broken_when_its_request_goes(engine):
    one = engine(blocks=40, max_len=600)
    one.run([prompt(1, 500)])
    one.forget()
    busy = one.ask(prompt(2, 400), 60)
    one.until(lambda: one.said[busy])
    name = one.ask(prompt(1, 500))
    one.until(lambda: one.lmc._requests[name].promise)
    one.abort(name)
    one.finish(busy)


@pytest.mark.parametrize("blocks", range(59, 65))
@pytest.mark.parametrize("own", [111, 140])
def test_loads_leave_each_other_the_blocks_to_go_on(engine, blocks, own):
    """vLLM would give all its blocks to two loads, each of which needs more of them to end."""
    one = engine(sliding(2, 100), blocks=blocks, max_len=500, budget=150)
    one.run([prompt(1, 208)])
    one.run([prompt(2, 320)])
    one.again([prompt(1, 208) + prompt(3, own), prompt(2, 320) + prompt(4, 2)])


def test_a_load_that_finds_no_room_is_computed_in_the_end(engine, monkeypatch):
    monkeypatch.setattr("lmc_vllm.scheduler.WAIT_FOR_ROOM_S", 0.05)
    one = engine(sliding(2, 100), blocks=60, max_len=500, budget=150)
    prompts = [prompt(1, 208), prompt(2, 320)]
    for ids in prompts:
        one.run([ids])
    one.forget()
    one.copies[0].may_load.clear()
    first, second = one.ask(prompts[0] + prompt(3, 140)), one.ask(prompts[1] + prompt(4, 2))
    one.until(lambda: one.computed[second])  # while the first one's load hangs
    assert one.status(first) == WAITING
    one.copies[0].may_load.set()
    one.finish(first, second)
    assert one.count("tokens.loaded") == 208


@pytest.mark.parametrize("kind", ["windows", "states"])
def test_loads_wait_for_each_other_only_where_blocks_are_few(engine, kind):
    states = {"block": 64, "mamba_mode": "align"}
    specs, options = {"windows": (sliding(2, 100), {}), "states": (mamba(2, "align"), states)}[kind]
    one = engine(specs, blocks=300 if kind == "windows" else 60, **options)
    prompts = [prompt(seed, 500) for seed in range(4)]
    one.run(prompts)
    one.forget()
    one.copies[0].may_load.clear()
    names = [one.ask(ids) for ids in prompts]
    one.until(lambda: all(one.status(name) == WAITING for name in names), 1)
    one.copies[0].may_load.set()
    one.finish(*names)


def test_an_engine_that_ends_in_the_middle_gives_everything_back(engine):
    """Stores, loads, promises and waiting requests under way: no lease is forgotten."""
    one = engine(blocks=60, max_len=800)
    one.run([prompt(1, 500)])
    one.forget()
    one.copies[0].may_load.clear()
    one.copies[0].may_store.clear()
    names = [one.ask(prompt(1, 500)), one.ask(prompt(2, 300), 50), one.ask(prompt(1, 500), 3)]
    one.until(lambda: one.status(names[0]) == WAITING and len(one.said[names[1]]) > 3)
    one.broken = True  # no settling
    side = one.lmc
    one.close()
    for lane in side.lanes:
        assert lane.store.ram.num_free + lane.store.ram.num_idle == lane.store.arena.num_slots


def test_more_than_ram_holds_is_kept_in_part(engine):
    one = engine(LMC_RAM_GB="0.002", blocks=300)
    prompts = [prompt(seed, 500) for seed in range(10)]
    for ids in prompts:
        one.run([ids])
    assert one.lmc.lanes[0].store.ram.evictions
    again = [one.again([ids])[0] for ids in reversed(prompts)]
    assert again[0] == 500 % 16
    assert again[-1] == 500


@pytest.mark.parametrize("specs", [full(4), sliding(4, 100)], ids=["full", "windows"])
def test_a_script_that_ends_leaves_nothing_unstored(engine, specs, tmp_path, monkeypatch):
    """Nobody steps an engine in the user's own process once there is nothing to answer."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tiers = {"LMC_TIERS": f"file://{tmp_path}"}
    one = engine(specs, blocks=300, **tiers)
    names = [one.ask(prompt(seed, 330), 40) for seed in range(2)]
    one.finish(*names)
    assert one.lmc._savings == {}
    _land(weakref.ref(one.lmc))
    other = engine(specs, blocks=300, **tiers)
    asked = [[*prompt(seed, 330), *one.said[name]] for seed, name in enumerate(names)]
    assert other.run(asked) == [(330 + 40 - 1) % 16 + 1] * 2


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
def test_the_token_that_ends_an_answer_is_not_kept(engine, overlap):
    """Nobody computed its KV; a step planned ahead may, after the blocks were copied."""
    one = engine(blocks=300, **({"overlap": True, "late": "all"} if overlap else {}))
    ids = prompt(1, 300)
    told = answer(ids, 4, one.seed())
    name = one.ask(ids, 60, stop=told[-1:])
    one.until(lambda: one.asked[name][0].is_finished())
    one.settle()
    assert one.said[name] == told
    assert one.again([[*ids, *told, 5]]) == [305 - 303 // 16 * 16]


def test_an_answer_comes_in_time_though_a_store_hangs(engine, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr("lmc_vllm.worker.FINISH_S", 0.01)
    one = engine(blocks=300)
    one.copies[0].may_store.clear()
    one.finish(one.ask(prompt(1, 330), 40))
    assert one.lmc._savings
    one.copies[0].may_store.set()
    one.settle()
    assert one.again([prompt(1, 330)]) == [330 % 16]
