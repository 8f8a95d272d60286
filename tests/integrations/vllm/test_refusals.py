"""What lmc does not serve is refused at start, by name, with what it does serve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm.v1 import kv_cache_interface as kv

from lmc_vllm.groups import groups_of
from lmc_vllm.pools import pools_of
from tests.integrations.vllm.fake import attention, full, local, mamba, prompt, sliding


def config(spec: kv.KVCacheSpec, **more: object) -> kv.KVCacheConfig:
    return kv.KVCacheConfig(8, [], [kv.KVCacheGroupSpec(["layers.0.attn"], spec, **more)])


FULL = kv.FullAttentionSpec(**attention())
UNSERVED = {
    "RSWASpec": kv.RSWASpec(**attention(), rswa_window=64),
    "SinkFullAttentionSpec": kv.SinkFullAttentionSpec(**attention()),
    "CrossAttentionSpec": kv.CrossAttentionSpec(**attention()),
    "SlidingWindowMLASpec": kv.SlidingWindowMLASpec(**attention(heads=1), sliding_window=128),
    "CircularBufferSpec": kv.CircularBufferSpec(**attention()),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_an_unknown_kind_of_layer_is_named(name):
    with pytest.raises(ValueError, match=rf"{name} \(layer layers.0.attn\); supported: full"):
        groups_of(config(UNSERVED[name]), 256)


def test_the_kv_of_a_draft_model_is_named():
    with pytest.raises(ValueError, match=r"draft model \(EAGLE, MTP\) \(layer layers.0.attn\)"):
        groups_of(config(FULL, is_eagle_group=True), 256)


@pytest.mark.parametrize(
    "more",
    [
        {"enable_kv_transfer": False},
        {"host_resident": True},
        {"role": kv.KVCacheGroupRole.HISPARSE_INDEXER},
    ],
    ids=str,
)
def test_kv_that_is_not_to_be_moved_is_refused(more):
    with pytest.raises(ValueError, match="KV of the role"):
        groups_of(config(FULL, **more), 256)


def test_states_handed_over_beside_blocks_of_another_size_are_refused():
    states, attention = mamba(2, "align", block=64), full(1, block=16)
    layers = {**{name: states[name] for name in list(states)[:1]}, **attention}
    groups = [kv.KVCacheGroupSpec([name], spec) for name, spec in layers.items()]
    config = kv.KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
    with pytest.raises(ValueError, match="another size \\(16, 64 tokens\\)"):
        groups_of(config, 256)


def test_lmc_stays_off_for_a_model_without_kv(engine, caplog):
    with caplog.at_level("INFO", logger="lmc"):
        one = engine({}, caching=False)
    assert "lmc stays off: this model has no KV cache" in caplog.text
    assert one.run([prompt(1, 300)] * 2) == [300, 300]


@pytest.mark.parametrize(
    ("specs", "options", "match"),
    [
        (mamba(4, "none"), {"block": 64, "mamba_mode": "none"}, "mamba_cache_mode 'none'"),
        (sliding(4, 40), {"blocks": 300}, "a sliding window of 40 tokens in blocks of 16"),
        (local(4, 96), {"blocks": 300}, "chunked local attention of 96 tokens in blocks of 16"),
    ],
    ids=["states", "windows", "local"],
)
def test_a_size_that_chunks_do_not_fit_is_named(engine, specs, options, match):
    with pytest.raises(ValueError, match=match):
        engine(specs, **options)


def test_a_hash_that_names_no_blocks_is_refused_with_the_choices(engine):
    with pytest.raises(ValueError, match=r"'xxhash': .*choices: sha256, sha256_cbor"):
        engine(arguments={"prefix_caching_hash_algo": "xxhash"})


def test_an_unknown_extra_setting_is_named_with_the_choices(engine):
    with pytest.raises(ValueError, match="'ram_gb' is unknown; choices: ram_bytes"):
        engine(extra={"ram_gb": 3})


@pytest.mark.parametrize("value", [0, -1, "1", 1.5])
def test_ram_that_is_no_number_of_bytes_is_refused(engine, value):
    with pytest.raises(ValueError, match="must be a positive whole number"):
        engine(extra={"ram_bytes": value})


def test_ram_given_to_vllm_goes_before_the_setting(engine):
    one = engine(extra={"ram_bytes": 20_000_000}, LMC_RAM_GB="0.5")
    store = one.lmc.lanes[0].store
    assert 19_900_000 < store.arena.num_slots * store.arena.slot_bytes <= 20_000_000


def test_too_little_ram_is_refused(engine):
    with pytest.raises(ValueError, match="fewer than two chunks"):
        engine(extra={"ram_bytes": 10_000})


def test_a_misspelt_setting_is_named(engine):
    with pytest.raises(ValueError, match="did you mean LMC_RAM_GB"):
        engine(LMC_RAM_G="1")


def test_workers_on_other_machines_are_refused(engine, monkeypatch):
    machines = iter(["this", "that"])
    monkeypatch.setattr("lmc_vllm.worker.machine_id", lambda: next(machines))
    with pytest.raises(ValueError, match="workers run on several machines"):
        engine(tp=2)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(engine, name):
    with pytest.raises(ValueError, match=rf"context parallelism \({name}=2\)"):
        engine(configure=lambda config: setattr(config.parallel_config, name, 2))


# --- memory


def cache(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def pools(tensor: torch.Tensor, name: str = "layers.0.attn", blocks: int = 8) -> object:
    return pools_of(groups_of(config(FULL), 256), blocks, {name: tensor})


def test_kv_elsewhere_than_in_the_memory_of_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"layer layers.0.attn on meta; supported: KV caches in"):
        pools(cache(8, 2, 16, 32, device="meta"))


def test_a_layer_of_no_group_is_named():
    one = {"layers.0.attn": cache(8, 2, 16, 32), "extra": cache(8, 2, 16, 32)}
    with pytest.raises(ValueError, match="no KV cache group of layer extra"):
        pools_of(groups_of(config(FULL), 256), 8, one)


def test_a_layer_without_a_cache_is_named():
    with pytest.raises(ValueError, match=r"no KV cache of layer layers.0.attn"):
        pools_of(groups_of(config(FULL), 256), 8, {})


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="12 rows are not whole blocks of 8"):
        pools(cache(12, 2, 16, 32))


@pytest.mark.parametrize(
    "tensor",
    [
        cache(16, 2, 8, 64)[..., :32],  # parts of a block that are not one run
        cache(8, 2, 16, 64)[..., ::2],  # no two bytes of one token together
        cache(8, 2, 16, 8)[..., :4],  # crumbs
    ],
    ids=["parts", "scattered", "crumbs"],
)
def test_a_layout_that_is_not_made_of_runs_is_refused_with_its_strides(tensor):
    with pytest.raises(ValueError, match=r"does not know the layout of layer layers.0.attn: shape"):
        pools(tensor)


def test_layers_of_one_group_that_differ_in_their_window_are_named():
    specs = {
        f"layers.{i}": kv.SlidingWindowSpec(**attention(), sliding_window=64 << i) for i in (0, 1)
    }
    group = kv.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
    with pytest.raises(ValueError, match="differ in window"):
        groups_of(replace(config(FULL), kv_cache_groups=[kv.KVCacheGroupSpec([*specs], group)]), 64)


def test_full_layers_of_different_shapes_are_one_group(engine):
    one = engine(full(2) | {"layers.9.attn": kv.FullAttentionSpec(**attention(heads=4))})
    assert one.lmc.lanes[0].layout.plane_bytes == (2048, 2048, 4096)
    one.run([prompt(1, 300)])
    assert one.again([prompt(1, 300)]) == [12]
