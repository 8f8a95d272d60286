"""Pools, topologies and settings that lmc does not serve are refused at start, by name."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from lmc.config import Config
from lmc_sglang import pools
from lmc_sglang.identity import Ranks, namespace_of
from tests.integrations.fixtures import SERVER_ARGS, make_model
from tests.integrations.harness import DIM, HEADS, LAYOUTS
from tests.integrations.models import mla


@pytest.fixture
def params(harness):
    return harness().params


def described(params, components=(ComponentType.FULL,), **changes):
    return pools.describe(dataclasses.replace(params, **changes), set(components))[0]


def test_a_plain_pool_is_described(params):
    pool = described(params)
    assert pool.num_layers == 4
    assert pool.fields["kv_dtype"] == "torch.float32"
    assert len(set(pool.pages.page_bytes)) == 1


def test_state_beside_full_attention(params):
    with pytest.raises(ValueError, match="SWA"):
        described(params, components=(ComponentType.FULL, ComponentType.SWA))


def test_a_window_that_requests_keep_for_themselves(harness, monkeypatch):
    params = harness(model_kind="swa").params
    kv = params.token_to_kv_pool_allocator.get_kvcache()
    monkeypatch.setattr(kv, "swa_req_ring_size", 128)
    with pytest.raises(ValueError, match="requests keep for themselves"):
        described(params, params.tree_components)


def test_pages_of_another_size_than_the_trees(params, monkeypatch):
    monkeypatch.setattr(params.token_to_kv_pool_allocator, "page_size", 16)
    with pytest.raises(ValueError, match="pages of 16 tokens in a tree of 64"):
        described(params)


def test_too_little_ram_for_several_pools_says_how_much_it_takes(harness):
    with pytest.raises(ValueError, match=r"two chunks of each of 3 pools; it takes") as refusal:
        harness(model_kind="swa-mamba", LMC_RAM_GB="0.002")
    enough = re.search(r"takes ([0-9.]+) GB", str(refusal.value))[1]
    harness(model_kind="swa-mamba", LMC_RAM_GB=str(float(enough) + 0.001))


def test_int8_states(harness, monkeypatch):
    params = harness(model_kind="mamba").params
    monkeypatch.setattr(params.req_to_token_pool, "mamba_ckpt_pool", object())
    with pytest.raises(ValueError, match="int8"):
        described(params, params.tree_components)


def test_states_of_a_draft_model(harness):
    params = harness(model_kind="mamba").params
    with pytest.raises(ValueError, match="draft"):
        described(params, params.tree_components, mtp_draft_mamba_pools=(object(),))


def test_another_pool_is_named(params, monkeypatch):
    """Also a kind of one that is served: what it does otherwise is unknown."""

    class Mine(MLATokenToKVPool):
        pass

    other = mla(256, 64, Mine)
    monkeypatch.setattr(params.token_to_kv_pool_allocator, "get_kvcache", lambda: other)
    with pytest.raises(ValueError, match=r"this pool \(pool Mine\).*supported: MHA"):
        described(params)


def test_an_unknown_draft_pool_is_named(params):
    with pytest.raises(ValueError, match=r"pool object"):
        described(params, sidecar_draft_device_pools=(object(),))


def test_layers_that_are_shared_out_among_ranks(params, monkeypatch):
    other = mla(256, 64)
    other.dcp_replicated = True
    monkeypatch.setattr(params.token_to_kv_pool_allocator, "get_kvcache", lambda: other)
    with pytest.raises(ValueError, match="shared out"):
        described(params)


def test_another_layout_is_named(params, monkeypatch):
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    for layout in ("page_major", "hnd"):  # a label that the buffers do not bear out
        monkeypatch.setattr(pool, "kv_cache_layout", layout)
        with pytest.raises(ValueError, match=f"layout {layout}|rows of .* bytes"):
            described(params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_a_page_is_one_run(harness, layout):
    """What the slots of pages 1 and 2 hold, and nothing else, are the bytes of these pages."""
    h = harness(layout=layout)
    pool, slots = described(h.params), torch.arange(h.page, 3 * h.page)
    assert pool.fields["pool_layout"] == layout
    values = torch.randperm(len(slots) * HEADS * DIM).float().view(len(slots), -1)
    for rows, plane in zip(h.rows[:2], pool.pages.planes[:2], strict=True):
        at, image = rows.at(slots, values.view(torch.uint8))
        rows.bytes[at] = image
        found = plane[1:3].reshape(-1).view(torch.float32)
        assert torch.equal(found.sort().values, torch.arange(values.numel()).float())


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_slots_lie_where_sglang_writes_them(harness, layout):
    """The third layout is written by a kernel for AMD's GPUs."""
    h, slots = harness(layout=layout), torch.cat([torch.arange(4032, 4096), torch.arange(64, 128)])
    k, v = torch.randn(2, len(slots), HEADS, DIM)
    h.pool.set_kv_buffer(None, slots, k, v, layer_id_override=2)
    for rows, values in zip(h.rows[4:6], (k, v), strict=True):
        at, image = rows.at(slots, values.flatten(1).view(torch.uint8))
        assert torch.equal(rows.bytes[at], image)


def placed(params, monkeypatch, device: torch.device):
    """The pool says that it lies on another device."""
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    info = msgspec.structs.replace(pool._mha_buffer_info(), device=device)
    monkeypatch.setattr(pool, "_mha_buffer_info", lambda: info)
    return params


def test_a_pool_on_a_gpu_is_described(params, monkeypatch):
    assert described(placed(params, monkeypatch, torch.device("cuda", 0))).num_layers == 4


def test_a_device_that_has_no_kernels_is_named(params, monkeypatch):
    with pytest.raises(ValueError, match="device xpu:0"):
        described(placed(params, monkeypatch, torch.device("xpu", 0)))


def test_fewer_pages_than_are_given_away(params, monkeypatch):
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    monkeypatch.setattr(pool, "size", pool.size + 64)
    with pytest.raises(ValueError, match="129 pages for 8256 tokens"):
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
    [{"load_format": "dummy"}, {"load_format": "remote_instance"}],
    ids=str,
)
def test_weights_that_the_folder_does_not_tell_stay_in_the_process(harness, arguments):
    h = harness()
    args = msgspec.structs.replace(SERVER_ARGS, model_path=h.server_args.model_path, **arguments)
    ranks = Ranks.of(args, h.params)
    pool = described(h.params)
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
        pool = described(h.params)
        ranks = Ranks.of(args, h.params)
        names.add(namespace_of(args, Config(), pool, h.store.layout, ranks).digest)
    assert len(names) == 2


def test_the_weights_of_a_draft_model_belong_to_its_name(harness, tmp_path):
    """Its KV is kept with the model's."""
    h, names = harness(model_kind="mha-draft"), set()
    for draft in ("one", "other", "nowhere"):
        folder = tmp_path / draft
        if draft != "nowhere":
            folder.mkdir()
            make_model(folder, draft.encode())
        args = msgspec.structs.replace(
            SERVER_ARGS,
            model_path=h.server_args.model_path,
            speculative_draft_model_path=str(folder),
        )
        found = namespace_of(
            args, Config(), described(h.params), h.store.layout, Ranks.of(args, h.params)
        )
        assert found.private == (draft == "nowhere")
        names.add(found.digest)
    assert len(names) == 3
