"""Weights that change under way: nothing computed with the old ones is found again."""

from __future__ import annotations

import pytest
from vllm.v1.request import RequestStatus

from tests.integrations.vllm.fake import full, mamba, prompt, sliding

MODELS = {
    "full": (full(4), {}),
    "windows": (sliding(4, 100), {}),
    "states": (mamba(4, "align"), {"block": 64, "mamba_mode": "align"}),
}


def change(one, **how: bool) -> bool:
    one.weights += 1
    return one.scheduler.reset_prefix_cache(reset_connector=True, **how)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_of_the_old_weights_is_found(engine, kind):
    specs, options = MODELS[kind]
    one = engine(specs, blocks=300, **options)
    one.run([prompt(1, 300)])
    assert change(one)
    assert one.again([prompt(1, 300)]) == [300]
    assert one.again([prompt(1, 300)])[0] <= 44


@pytest.mark.parametrize("kind", MODELS)
def test_requests_that_begin_again_are_kept_with_the_new_weights(engine, kind):
    specs, options = MODELS[kind]
    one = engine(specs, blocks=300, budget=128, **options)
    names = [one.ask(prompt(seed, 300), 40) for seed in (1, 2)]
    one.until(lambda: len(one.said[names[0]]) > 5)
    assert change(one, reset_running_requests=True)
    one.settle()
    assert all(one.asked[name][0].is_finished() for name in names)
    assert max(one.again([prompt(1, 300), prompt(2, 300)])) <= 300 % options.get("block", 16)


def test_requests_that_go_on_are_not_kept(engine):
    """vLLM's own cache could not be reset: what it holds is of two kinds of weights."""
    one = engine()
    names = [one.ask(prompt(seed, 300), 40) for seed in (1, 2)]
    one.until(lambda: len(one.said[names[1]]) > 5)
    assert not one.scheduler.reset_prefix_cache(reset_connector=True)
    one.finish(*names)
    one.run([prompt(1, 300) + prompt(3, 100)])  # on vLLM's own old blocks
    assert one.again([prompt(1, 300), prompt(2, 300)]) == [300, 300]
    assert max(one.again([prompt(1, 300), prompt(2, 300)])) == 12


def test_what_a_request_that_goes_on_leaves_in_vllms_cache_is_not_kept(engine):
    """That cache was empty when the weights changed, and is of old weights nevertheless."""
    one = engine()
    name = one.ask(prompt(1, 10), 100)
    one.until(lambda: len(one.said[name]) > 2)
    assert not one.scheduler.reset_prefix_cache(reset_connector=True)
    one.until(lambda: len(one.said[name]) > 60)
    ids = prompt(1, 10) + one.said[name][:50] + prompt(2, 100)
    second = one.ask(ids)
    one.finish(second)
    assert one.computed[second] < 160  # vLLM found the blocks
    one.finish(name)
    one.settle()
    assert one.again([ids]) == [160]


def test_without_vllms_own_cache_only_requests_that_go_on_are_not_kept(engine):
    one = engine(caching=False)
    name = one.ask(prompt(1, 300), 100)
    one.until(lambda: len(one.said[name]) > 2)
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.finish(one.ask(prompt(2, 300)), name)
    one.settle()
    assert one.run([prompt(1, 300), prompt(2, 300)]) == [300, 12]
    longer = [*prompt(1, 300), *one.said[name]]
    assert one.run([longer]) == [400 - 288]  # nor what it answered


@pytest.mark.parametrize("world", [{}, {"tp": 2}, {"overlap": True, "late": "all"}], ids=str)
def test_a_load_under_way_brings_nothing(engine, world):
    one = engine(**world)
    one.run([prompt(1, 300)])
    one.forget()
    for copies in one.copies:
        copies.may_load.clear()
    name = one.ask(prompt(1, 300))
    one.until(lambda: one.status(name) == RequestStatus.WAITING_FOR_REMOTE_KVS)
    change(one)
    one.step()
    for copies in one.copies:
        copies.may_load.set()
    one.finish(name)
    assert one.computed[name] == 300


def test_a_promise_of_the_old_weights_is_broken(engine):
    one = engine(blocks=40, max_len=600)
    one.run([prompt(1, 500)])
    one.forget()
    busy = one.ask(prompt(2, 400), 60)
    one.until(lambda: one.said[busy])
    name = one.ask(prompt(1, 500))
    one.until(lambda: one.lmc._requests[name].promise)
    change(one, reset_running_requests=True)
    one.finish(name)
    assert one.computed[name] == 500


def test_a_store_under_way_is_not_found(engine):
    one = engine()
    one.copies[0].may_store.clear()
    name = one.ask(prompt(1, 300), 30)
    one.until(lambda: len(one.said[name]) > 3)
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.copies[0].may_store.set()
    one.finish(name)
    one.settle()
    assert one.again([prompt(1, 300)]) == [300]


def test_lasting_tiers_get_nothing_of_changed_weights(engine, tmp_path):
    one = engine(LMC_TIERS=f"file://{tmp_path}?gb=1")
    change(one)
    one.run([prompt(1, 300)])
    assert one.count("disk.written") == 0
    assert one.again([prompt(1, 300)]) == [12]
