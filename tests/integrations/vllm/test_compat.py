"""The contract with vLLM: everything lmc rests on is there, and what is not is named."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1 import kv_cache_interface, outputs

from lmc_vllm import compat
from lmc_vllm.connector import LMCConnector


def test_this_vllm_is_the_one_lmc_knows():
    compat.check()
    assert compat.vllm_version() in compat.TESTED


def test_a_parameter_that_changed_is_named(monkeypatch):
    monkeypatch.setattr(
        KVConnectorBase_V1, "get_num_new_matched_tokens", lambda self, request, blocks: None
    )
    with pytest.raises(RuntimeError, match=r"get_num_new_matched_tokens\(self, request, blocks\)"):
        compat.check()


def test_everything_that_is_gone_is_named_at_once(monkeypatch):
    monkeypatch.delattr(KVConnectorBase_V1, "handle_preemptions")
    monkeypatch.delattr(kv_cache_interface, "MambaSpec")
    monkeypatch.delattr(outputs, "KVConnectorOutput")
    with pytest.raises(RuntimeError) as raised:
        compat.check()
    for name in ("handle_preemptions is gone", "MambaSpec is gone", "KVConnectorOutput is gone"):
        assert name in str(raised.value)


def test_an_engine_that_differs_is_refused_at_start(engine, monkeypatch):
    monkeypatch.setitem(compat.SIGNATURES, "vllm.v1.vanished.function", None)
    with pytest.raises(RuntimeError, match=r"what differs: vllm.v1.vanished.function is gone"):
        engine()


def test_an_untested_release_only_warns(monkeypatch, caplog):
    monkeypatch.setattr(compat, "TESTED", ("0.0.1",))
    compat.check()
    assert "lmc was tested with 0.0.1" in caplog.text


def test_every_method_that_lmc_overrides_is_vllms():
    mine = {
        name
        for name, value in vars(LMCConnector).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    known = {name for base in LMCConnector.__mro__[1:] for name in vars(base)}
    assert mine <= known


@pytest.mark.parametrize("name", compat.HASHES)
def test_hashes_are_those_of_every_process(name):
    """The same tokens have the same key in a process that starts anew."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    assert resolve_none_hash_seed(get_hash_fn_by_name(name)) == "vllm-none-hash"


def test_vllm_calls_the_blocks_of_an_adapter_by_its_name_and_path():
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    keys = [
        _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=LoRARequest("a", number, "/b")))
        for number in (1, 2)
    ]
    assert keys == [[("lora", "a", "/b")]] * 2
