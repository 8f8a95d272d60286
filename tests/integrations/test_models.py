"""Every kind of pool SGLang has: what comes back is what went in, in every buffer of it."""

from __future__ import annotations

import random

import pytest

from tests.integrations.harness import tokens
from tests.integrations.test_linker import digests_of

MODELS = (
    "mla",
    "mla-fp4",
    "dsa",
    "mha-fp4",
    "mha-mxfp8",
    "mha-draft",
    "mha-eagle-draft",
    "mla-eagle-draft",
    "swa",
    "swa-mla",
    "swa-draft",
    "mamba",
    "mamba-mla",
    "swa-mamba",
)


@pytest.mark.parametrize("model", MODELS)
def test_a_repeated_prompt_comes_back_after_a_flush(harness, model):
    h = harness(model_kind=model)
    ids = tokens(1, 1500)
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    assert h.run(ids) >= 1344
    h.settle()
    h.flush()
    assert h.run(ids + tokens(2, 300)) >= 1408


@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("model", ["mla", "swa", "mamba", "swa-mamba"])
def test_every_page_size(harness, model, page):
    h = harness(page, model_kind=model)
    ids = tokens(1, 1500)
    h.run(ids)
    h.settle()
    h.flush()
    step = max(page, 16) if model == "mla" else page
    assert h.run(ids + tokens(2, 300)) == 1500 // step * step


@pytest.mark.parametrize("page", [1, 64])
def test_a_state_is_found_where_a_prompt_ended(harness, page):
    """Without buffers of their own (pages of one token) states end at any token."""
    h = harness(page, model_kind="mamba")
    chat = tokens(1, 391)
    h.run(chat)
    h.settle()
    h.flush()
    assert h.run(chat + tokens(2, 500)) == len(h.whole(chat))


@pytest.mark.parametrize("model", ["mla", "mha-eagle-draft", "swa", "mamba", "swa-mamba"])
def test_chunks_come_back_from_disk_in_a_new_process(harness, tmp_path, model):
    place = f"file://{tmp_path}?gb=1"
    ids = tokens(1, 1500)
    first = harness(model_kind=model, LMC_TIERS=place)
    first.run(ids)
    first.settle()
    first.close()
    second = harness(cold=True, model_kind=model, LMC_TIERS=place)
    assert second.run(ids + tokens(2, 300)) == len(first.whole(ids))


@pytest.mark.parametrize("model", ["mla", "mha-draft", "mha-eagle-draft", "swa"])
def test_a_prompt_that_diverges_in_a_chunk_reuses_the_pages_before(harness, model):
    h = harness(model_kind=model)
    ids = tokens(1, 1500)
    h.run(ids)
    h.settle()
    h.flush()
    assert h.run(ids[:1100] + tokens(2, 400)) == 1088


@pytest.mark.parametrize("model", ["mla", "swa", "mamba", "swa-mamba", "mha-eagle-draft"])
def test_each_turn_of_a_chat_reuses_the_turn_before(harness, model):
    h = harness(model_kind=model)
    chat = tokens(1, 300)
    for turn in range(6):
        h.settle()
        h.flush()
        before = len(h.whole(chat)) if turn else 0
        chat = chat + tokens(10 + turn, 170)
        assert h.run(chat) == before


@pytest.mark.parametrize("model", ["swa", "swa-mamba"])
def test_turns_whose_beginning_is_on_the_device(harness, model):
    """Windows begin in nodes that were stored before: their pages are held meanwhile."""
    h = harness(model_kind=model)
    chat = tokens(1, 300)
    for turn in range(6):
        h.settle()
        before = len(h.whole(chat)) if turn else 0
        chat = chat + tokens(10 + turn, 170)
        assert h.run(chat) == before
    h.settle()
    h.flush()
    assert h.run(chat + tokens(99, 100)) == len(h.whole(chat))


@pytest.mark.parametrize("model", ["mla", "swa", "mamba", "swa-mamba"])
def test_a_flush_during_a_store_leaves_nothing_held(harness, model):
    h = harness(model_kind=model)
    chat = tokens(1, 700)
    h.run(chat)
    h.run(chat + tokens(2, 300))
    h.reset()  # copies still under way
    for lane in h.linker.lanes:
        lane.store.ram.check()
        assert not any(lane.store.ram._pins)
    assert h.run(chat + tokens(2, 300) + tokens(3, 100)) == 960


def test_a_window_that_is_gone_shortens_the_hit(harness):
    h = harness(model_kind="swa")
    ids = tokens(1, 1500)
    h.run(ids)
    h.settle()
    h.flush()
    ram = h.linker.lanes[1].store.ram
    (tail,) = ram.find(h.linker.lanes[1].steps(digests_of(ids, 64)[22:], 22)[1], 22)
    ram._drop(tail.slot)
    assert h.run(ids) == 1408


@pytest.mark.parametrize("model", ["mla", "swa", "mamba", "swa-mamba", "mha-eagle-draft"])
@pytest.mark.parametrize("seed", range(2))
def test_random_prompts_under_pressure(harness, tmp_path, model, seed):
    """Small pools, little RAM, a disk: every byte that comes back is checked."""
    rng = random.Random(seed)
    page = rng.choice([16, 64])
    h = harness(
        page,
        size=4096,
        model_kind=model,
        LMC_RAM_GB="0.03",
        LMC_TIERS=f"file://{tmp_path}?gb=1",
    )
    roots = [tokens(n, 600) for n in range(4)]
    hits, asked = 0, roots[:1]
    for _ in range(60):
        if rng.random() < 0.5:
            ids = rng.choice(asked) + tokens(rng.randrange(8), rng.randrange(1, 200))
        else:
            ids = rng.choice(roots)[: rng.randrange(100, 600)] + tokens(rng.randrange(8), 100)
        asked.append(ids[:1500])
        hits += h.run(ids)
        if rng.random() < 0.3:
            h.settle()
        if rng.random() < 0.1:
            h.flush()
        if rng.random() < 0.05:
            h.linker.weights_changed()
            h.flush()
    h.settle()
    h.flush()
    for rid in list(h.linker._arrivals):
        h.linker.request_aborted(rid)
    for lane in h.linker.lanes:
        lane.store.drain(10)
        lane.store.ram.check()
        assert not any(lane.store.ram._pins)
    assert hits > 0
