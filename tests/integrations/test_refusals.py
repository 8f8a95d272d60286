"""Pools, topologies and settings that lmc does not serve are refused at start, by name."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from lmc.config import Config
from lmc_sglang import pools
from lmc_sglang.identity import Ranks, namespace_of
from tests.integrations.fixtures import SERVER_ARGS


@pytest.fixture
def params(harness):
    return harness().params


def described(params, components=(ComponentType.FULL,), **changes):
    return pools.describe(dataclasses.replace(params, **changes), set(components))


def test_a_plain_pool_is_described(params):
    pool = described(params)
    assert pool.num_layers == 4
    assert pool.fields["kv_dtype"] == "torch.float32"
    assert len(set(pool.pages.page_bytes)) == 1


def test_state_beside_full_attention(params):
    with pytest.raises(ValueError, match="SWA"):
        described(params, components=(ComponentType.FULL, ComponentType.SWA))


@pytest.mark.parametrize(
    "name", ["sidecar_draft_device_pools", "mtp_draft_device_pools", "mtp_draft_mamba_pools"]
)
def test_draft_pools(params, name):
    with pytest.raises(ValueError, match="speculative"):
        described(params, **{name: (object(),)})


def test_a_bigram_tree(params):
    with pytest.raises(ValueError, match="EAGLE"):
        described(params, is_eagle=True)


def test_another_pool_is_named(params, monkeypatch):
    other = MLATokenToKVPool(
        256,
        64,
        dtype=torch.float32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    monkeypatch.setattr(params.token_to_kv_pool_allocator, "get_kvcache", lambda: other)
    with pytest.raises(ValueError, match=r"MLATokenToKVPool.*supported: MHA"):
        described(params)


def test_another_layout_is_named(params, monkeypatch):
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    monkeypatch.setattr(pool, "kv_cache_layout", "hnd")
    with pytest.raises(ValueError, match="layout hnd"):
        described(params)


@pytest.mark.parametrize("change", [{"pp_size": 2}, {"attn_cp_size": 2}])
def test_ranks_that_cannot_agree(params, change):
    with pytest.raises(ValueError, match="parallelism"):
        Ranks.of(SERVER_ARGS, dataclasses.replace(params, **change))


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("LMC_CHUNK_TOKENS", "32", "64"),
        ("LMC_CHUNK_TOKENS", "96", "multiple"),
        ("LMC_RAM_GB", "0.001", "chunks"),
        ("LMC_RAM_GB", "much", "number"),
        ("LMC_TIERS", "ftp://host", "file://"),
        ("LMC_TIERS", "file://host/path", "absolute"),
        ("LMC_RAM", "1", "LMC_RAM_GB"),
    ],
)
def test_a_bad_setting_is_named_with_its_choices(harness, setting, value, reason, monkeypatch):
    monkeypatch.setenv(setting, value)
    with pytest.raises(ValueError, match=setting) as refusal:
        harness(**{setting: value})
    assert reason in str(refusal.value)


def test_unknown_weights_stay_in_the_process(harness, tmp_path, caplog):
    h = harness(model=tmp_path / "nowhere", LMC_TIERS=f"file://{tmp_path}/tier")
    assert h.store.namespace.private
    assert "LMC_MODEL_VERSION" in caplog.text
    assert not harness(model=tmp_path / "nowhere", LMC_MODEL_VERSION="v1").store.namespace.private


@pytest.mark.parametrize(
    "arguments",
    [{"load_format": "dummy"}, {"load_format": "remote_instance"}, {"enable_lora": True}],
    ids=str,
)
def test_weights_that_the_folder_does_not_tell_stay_in_the_process(harness, arguments):
    h = harness()
    args = msgspec.structs.replace(SERVER_ARGS, model_path=h.server_args.model_path, **arguments)
    ranks = Ranks.of(args, h.params)
    pool = pools.describe(h.params, {ComponentType.FULL})
    assert namespace_of(args, Config(), pool, h.store.layout, ranks).private


def test_scales_of_the_kv_belong_to_its_name(harness, tmp_path):
    h, names = harness(), set()
    for scales in ("one", "other"):
        file = tmp_path / scales
        file.write_text(scales)
        args = msgspec.structs.replace(
            SERVER_ARGS,
            model_path=h.server_args.model_path,
            quantization_param_path=str(file),
        )
        pool = pools.describe(h.params, {ComponentType.FULL})
        ranks = Ranks.of(args, h.params)
        names.add(namespace_of(args, Config(), pool, h.store.layout, ranks).digest)
    assert len(names) == 2
