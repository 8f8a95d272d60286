"""What was computed once comes back byte for byte, in every layout and world: the model reads
nothing that it would not have computed itself.
"""

from __future__ import annotations

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from tests.integrations.vllm.fake import full, local, mamba, mla, prompt, sliding
from tests.integrations.vllm.harness import LAYOUTS

WORLDS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2, late": {"tp": 2, "pp": 2, "late": "last stage"},
}
DENSE = {
    "block": 64,
    "mamba_mode": "align",
    "arguments": {"prefix_cache_retention_interval": 64},
}
MODELS = {
    "windows": (sliding(4, 100), {}),
    "windows that begin with a block's last token": (sliding(4, 98), {}),
    "windows alone": (sliding(4, 100, every=99), {}),
    "wide windows": (sliding(6, 300, every=3), {}),
    "local attention": (local(4, 128), {}),
    "states, align": (mamba(4, "align"), {"block": 64, "mamba_mode": "align"}),
    "states, finer hits": (
        mamba(4, "align"),
        {"block": 64, "mamba_mode": "align", "arguments": {"prefix_match_unit": 16}},
    ),
    "states at every boundary": (mamba(4, "align"), DENSE),
    "states, all": (mamba(4, "all"), {"block": 64, "mamba_mode": "all"}),
    "MLA": (mla(3), {}),
}
PROMPTS = [prompt(1, 300), prompt(2, 511), prompt(3, 40), prompt(1, 200) + prompt(4, 320)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_come_back_in_every_layout_and_world(engine, layout, world):
    one = engine(full(4), layout=layout, **WORLDS[world])
    one.run(PROMPTS, 5)
    assert one.again(PROMPTS, 5) == [12, 15, 8, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_that_share_their_memory_come_back_in_every_layout(engine, layout):
    one = engine(sliding(4, 100), layout=layout, blocks=300)
    one.run(PROMPTS, 5)
    assert one.again(PROMPTS, 5) == [12, 15, 8, 8]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("overlap", [False, True])
def test_every_kind_of_layer_comes_back(engine, kind, overlap):
    specs, options = MODELS[kind]
    one = engine(specs, blocks=450, overlap=overlap, late="all" if overlap else "no", **options)
    step = options.get("block", 16)
    one.run(PROMPTS, 70)
    assert max(one.again(PROMPTS, 70)) <= step
    longer = [ids + prompt(9, 100) for ids in PROMPTS]
    assert max(one.again(longer, 70)) <= step + 100
    assert max(one.again(longer, 5)) <= step


@pytest.mark.parametrize("kind", ["windows", "local attention", "states, align", "MLA"])
@pytest.mark.parametrize("world", ["tp2", "pp2"])
def test_every_kind_of_layer_comes_back_to_several_workers(engine, kind, world):
    specs, options = MODELS[kind]
    one = engine(specs, blocks=300, **options, **WORLDS[world])
    one.run(PROMPTS, 5)
    assert max(one.again(PROMPTS, 5)) <= options.get("block", 16)


def test_a_stage_without_a_layer_of_a_group_comes_back(engine):
    one = engine(sliding(6, 100, every=6), blocks=900, pp=2)
    assert sorted(len(lane.layout.plane_bytes) for lane in one.lmc.lanes) == [1] * 6
    one.run(PROMPTS, 5)
    assert one.again(PROMPTS, 5) == [12, 15, 8, 8]


def test_workers_with_the_same_kv_copy_it_out_once(engine):
    one = engine(full(4, heads=1, max_tp_shards=2), tp=4)
    one.run(PROMPTS)
    assert [copies.stored > 0 for copies in one.copies] == [True, False, True, False]
    assert one.again(PROMPTS) == [12, 15, 8, 8]
    assert len({copies.loaded for copies in one.copies}) == 1


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("kernel_block", [16, 32])
def test_blocks_that_the_kernel_splits_come_back(engine, layout, kernel_block):
    one = engine(full(4, block=64), block=64, kernel_block=kernel_block, layout=layout, blocks=60)
    one.run(PROMPTS)
    assert one.again(PROMPTS) == [44, 63, 40, 8]


@pytest.mark.parametrize(("block", "recomputed"), [(8, 12), (16, 12), (32, 12), (128, 44)])
def test_every_block_size_comes_back(engine, block, recomputed):
    one = engine(full(2, block=block), block=block, blocks=4096 // block)
    one.run([prompt(1, 300)])
    assert one.again([prompt(1, 300)]) == [recomputed]


def test_layers_that_share_their_kv_are_kept_once(engine):
    one = engine(full(4), shares={"layers.9.attn": "layers.1.attn"})
    assert len(one.lmc.lanes[0].layout.plane_bytes) == 4
    one.run(PROMPTS)
    assert one.again(PROMPTS) == [12, 15, 8, 8]


@pytest.mark.parametrize("specs", [full(2), sliding(2, 200)], ids=["full", "windows"])
def test_a_long_prompt_recomputes_at_most_a_block(engine, specs):
    one = engine(specs, max_len=4500, blocks=700)
    ids = prompt(1, 4091)
    one.run([ids])
    assert one.again([ids]) == [4091 % 16]
    assert one.count("tokens.loaded") == 4091 // 16 * 16


@pytest.mark.parametrize("specs", [full(2), sliding(2, 100), local(2, 96)])
@pytest.mark.parametrize("length", [16, 48, 63, 64, 65, 96, 127, 128, 129, 192, 1024])
def test_a_whole_prompt_is_a_hit_at_and_around_chunk_boundaries(engine, specs, length):
    is_local = any(isinstance(spec, kv.ChunkedLocalAttentionSpec) for spec in specs.values())
    one = engine(specs, blocks=300, LMC_CHUNK_TOKENS="96" if is_local else "64")
    one.run([prompt(1, length)])
    [computed] = one.again([prompt(1, length)])
    # the last token reads its own local chunk, of which a prefix that ends there needs nothing
    whole = 16 if length % 96 == 0 and is_local else 1
    assert computed == (length % 16 or whole)


def test_a_prompt_that_diverges_in_a_chunk_reuses_the_blocks_before(engine):
    one = engine()
    one.run([prompt(1, 500)])
    assert one.again([prompt(1, 300) + prompt(2, 200)]) == [500 - 288]


def test_each_turn_of_a_chat_reuses_the_turn_before(engine):
    one = engine()
    chat = prompt(1, 300)
    for turn in range(5):
        [computed] = one.again([chat], 20)
        assert computed == 300 if not turn else computed <= 70 + 16 + 1
        chat = [*chat, *one.said[f"r{turn + 1}"], *prompt(10 + turn, 70)]


@pytest.mark.parametrize("budget", [64, 100, 333])
@pytest.mark.parametrize("kind", ["windows", "local attention", "states at every boundary"])
def test_a_prefill_in_pieces_is_kept(engine, budget, kind):
    """Blocks that slide out while a prompt is read are kept by the step that filled them."""
    specs, options = MODELS[kind]
    one = engine(specs, blocks=300, budget=budget, **options)
    step = options.get("block", 16)
    ids = prompt(1, 900)
    one.run([ids], 3)
    assert one.again([ids], 3)[0] <= step
    for length in (800, 450, 230):  # also where nothing ended
        computed = one.again([ids[:length] + prompt(length, 50)], 3)[0]
        assert computed <= length % step + 50 + (333 if step == 64 else 64)


def test_what_decoding_fills_is_kept(engine):
    one = engine(sliding(4, 100), blocks=300)
    ids = prompt(1, 100)
    one.run([ids], 400)
    assert one.again([[*ids, *one.said["r1"]]])[0] <= 20


def test_states_are_kept_where_vllm_keeps_them(engine):
    """By default at the end of what is asked only; a prompt that turns off before finds none."""
    specs, options = MODELS["states, align"]
    one = engine(specs, blocks=300, **options)
    ids = prompt(1, 900)
    one.run([ids])
    state = one.lmc.lanes[0]
    assert state.group.offered
    assert state.store.ram.live_steps() == 1
    assert one.again([ids[:800] + prompt(2, 50)]) == [850]
    assert one.again([ids + prompt(3, 50)]) == [900 % 64 + 50]


@pytest.mark.parametrize("kind", ["windows", "states, all", "MLA"])
def test_requests_without_vllms_own_cache_come_back(engine, kind):
    specs, options = MODELS[kind]
    one = engine(specs, caching=False, blocks=300, **options)
    one.run(PROMPTS, 5)
    assert max(one.run(PROMPTS, 5)) <= options.get("block", 16)


def test_salts_do_not_share(engine):
    one = engine()
    ids = prompt(1, 300)
    one.run([ids], salt="a")
    assert one.again([ids], salt="b") == [300]
    assert one.again([ids]) == [300]
    assert one.again([ids], salt="a") == [12]


def test_other_pictures_are_other_prompts(engine):
    one = engine()
    one.scheduler.max_num_encoder_input_tokens = 1000
    one.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)

    def picture(name: str) -> list[MultiModalFeatureSpec]:
        return [MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=100, length=90))]

    ids = prompt(1, 300)
    one.run([ids], mm_features=picture("a cat"))
    assert one.again([ids], mm_features=picture("a dog")) == [300 - 96]
    assert one.again([ids], mm_features=picture("a cat")) == [12]


def test_a_request_that_must_not_read_caches_is_computed_and_kept(engine):
    one = engine()
    ids = prompt(1, 300)
    one.run([ids])
    one.forget()
    name = one.ask(ids)
    one.asked[name][0].skip_reading_prefix_cache = True
    one.finish(name)
    assert one.computed[name] == 300


def test_blocks_that_vllm_no_longer_holds_are_not_kept(engine):
    """A hit of vLLM's own has no blocks where a window has moved on."""
    one = engine(sliding(4, 100), blocks=300)
    one.run([prompt(1, 600)])
    for lane in one.lmc.lanes:
        lane.store.renew()
    one.run([[*prompt(1, 600), 5]])
    assert one.again([prompt(1, 300)]) == [300]


def test_what_vllm_still_has_is_not_loaded(engine):
    one = engine()
    ids = prompt(1, 300)
    one.run([ids])
    assert one.run([ids + prompt(2, 100)]) == [112]
    assert one.count("tokens.loaded") == 0
