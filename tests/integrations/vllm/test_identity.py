"""Whose chunks these are: everything that changes their bytes gives them another name, and nothing
else does.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.integrations.vllm.fake import full, prompt, sliding
from tests.integrations.vllm.fixtures import make_model


def names(one) -> list[bytes]:
    return [lane.store.namespace.digest for lane in one.lmc.lanes]


def backend(name: str, isa: str | None = None):
    """What an attention layer says of the kernels that lay out its blocks."""

    def configure(config) -> None:
        layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: name), isa=isa)
        config.compilation_config.static_forward_context["layers.0.attn"] = layer

    return configure


def setting(place: str, name: str, value: object):
    return lambda config: setattr(getattr(config, place), name, value)


CHANGES = {
    "layout": {"layout": "LBNHC"},
    "block": {"block": 32, "specs": full(4, block=32)},
    "layers": {"specs": full(3)},
    "heads": {"specs": full(4, heads=4)},
    "groups": {"specs": sliding(4, 100), "blocks": 300},
    "tensor parallel": {"tp": 2},
    "pipeline parallel": {"pp": 2},
    "chunks": {"LMC_CHUNK_TOKENS": "128"},
    "salt": {"LMC_SALT": "another tenant"},
    "version": {"LMC_MODEL_VERSION": "v2"},
    "hash": {"arguments": {"prefix_caching_hash_algo": "sha256_cbor"}},
    "dtype": {"arguments": {"dtype": "float32"}},
    "overrides": {"configure": setting("model_config", "hf_overrides", {"rope_theta": 1e6})},
    "quantization": {"configure": setting("model_config", "quantization", "fp8")},
    "cache dtype": {"configure": setting("cache_config", "cache_dtype", "fp8_e4m3")},
    "scales": {"configure": setting("cache_config", "calculate_kv_scales", True)},
    "backend": {"configure": backend("FLASH_ATTN")},
    "instructions": {"configure": backend("CPU_ATTN", "amx")},
}


def build(engine, specs=None, **options):
    return engine(specs or full(4), **options)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_bytes_changes_the_name(engine, change):
    one, other = build(engine), build(engine, **CHANGES[change])
    assert not set(names(one)) & set(names(other))


def test_the_hash_seed_changes_the_name(engine, monkeypatch):
    one = engine()
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert names(engine()) != names(one)


def test_other_weights_have_another_name(engine, tmp_path_factory):
    other = make_model(tmp_path_factory.mktemp("other"), b"weights of the other model")
    assert names(engine(model=other)) != names(engine())


def test_instructions_that_differ_in_name_only_do_not_share(engine):
    kinds = [backend("CPU_ATTN", "amx"), backend("CPU_ATTN", "vec"), backend("OTHER", "vec")]
    assert len({names(engine(configure=kind))[0] for kind in kinds}) == 3


def test_what_changes_no_bytes_keeps_the_name(engine):
    one = engine()
    for options in (
        {"blocks": 150},
        {"budget": 100},
        {"seqs": 3},
        {"overlap": True},
        {"LMC_RAM_GB": "0.05"},
    ):
        assert names(engine(**options)) == names(one)


def test_groups_have_names_of_their_own(engine):
    both = names(engine(sliding(4, 100), blocks=300))
    assert len(set(both)) == 2


def test_weights_nobody_can_tell_stay_in_the_process(engine, tmp_path, caplog):
    one = engine(arguments={"load_format": "dummy"}, LMC_TIERS=f"file://{tmp_path}?gb=1")
    assert "cannot tell the weights" in caplog.text
    one.run([prompt(1, 300)])
    assert one.count("disk.written") == 0
    assert one.again([prompt(1, 300)]) == [12]


@pytest.mark.parametrize("specs", [full(4), sliding(4, 100)], ids=["full", "windows"])
@pytest.mark.parametrize("cold", [True, False])
def test_chunks_come_back_from_disk_in_a_new_process(engine, tmp_path, specs, cold):
    place = f"file://{tmp_path}?gb=1"
    prompts = [prompt(1, 300), prompt(2, 700)]
    first = engine(specs, blocks=300, LMC_TIERS=place)
    first.run(prompts, 20)
    first.close()
    second = engine(specs, blocks=300, LMC_TIERS=place, cold=cold)
    assert second.run(prompts, 20) == [12, 12]


def test_another_identity_in_the_same_folder_finds_nothing(engine, tmp_path):
    place = f"file://{tmp_path}?gb=1"
    first = engine(LMC_TIERS=place)
    first.run([prompt(1, 300)])
    first.close()
    assert engine(LMC_TIERS=place, LMC_SALT="b").run([prompt(1, 300)]) == [300]
    assert engine(LMC_TIERS=place).run([prompt(1, 300)]) == [12]
