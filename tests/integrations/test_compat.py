"""The contract with SGLang: everything lmc rests on is there, and what is not is named."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from lmc_sglang import compat
from lmc_sglang.layers import LayerCounter


def test_this_sglang_is_the_one_lmc_knows():
    compat.check()


def test_a_parameter_that_changed_is_named(monkeypatch):
    monkeypatch.setitem(compat.SIGNATURES, f"{compat.WRAPPER}.match", ("self", "key"))
    with pytest.raises(
        RuntimeError, match=r"UnifiedCacheLinkerWrapper\.match\(self, key, req, result\)"
    ):
        compat.check()


def test_a_name_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(compat.SIGNATURES, f"{compat.WRAPPER}.vanished", None)
    with pytest.raises(RuntimeError, match="vanished is gone"):
        compat.check()


def test_a_field_that_is_gone_is_named(monkeypatch):
    transfer = "sglang.srt.mem_cache.hicache_storage.PoolTransfer"
    monkeypatch.setitem(compat.FIELDS, transfer, ("keys", "vanished"))
    monkeypatch.setitem(compat.FIELDS, "sglang.srt.nowhere.Nothing", ("x",))
    with pytest.raises(RuntimeError, match=r"PoolTransfer\.vanished; .*nowhere\.Nothing"):
        compat.check()


def test_a_new_duty_of_linkers_is_named(monkeypatch):
    duties = UnifiedCacheLinker.__abstractmethods__ | {"prefetch"}
    monkeypatch.setattr(UnifiedCacheLinker, "__abstractmethods__", duties)
    with pytest.raises(RuntimeError, match="linker method prefetch"):
        compat.check()


def test_an_untested_release_only_warns(monkeypatch, caplog):
    monkeypatch.setattr(compat, "TESTED", ("0.0.1",))
    compat.check()
    assert "was tested with 0.0.1" in caplog.text


def test_a_fused_draft_waits_for_the_load_of_its_batch():
    waited = []
    counter = LayerCounter(3)
    index = counter.begin(SimpleNamespace(let_wait=waited.append))
    counter.events[index].wait(2)
    counter.end(index)
    counter.events[index].wait(2)
    counter.events[-1].wait(2)
    assert waited == [2]


COUNTER_USERS = (
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.managers.tp_worker",
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner",
)


@pytest.mark.parametrize("user", COUNTER_USERS)
def test_the_counter_of_layers_has_what_sglang_uses(user):
    path = find_spec(user).origin
    used = set(re.findall(r"counter\.([a-z_]+)\b", Path(path).read_text()))
    assert used
    assert used <= compat.COUNTER_NAMES
    assert all(hasattr(LayerCounter(4), name) for name in compat.COUNTER_NAMES)


def test_a_forward_runs_in_the_stream_of_forwards_or_in_the_current_one(monkeypatch):
    device, own, forwards = torch.device("cuda", 0), stream_of(1), stream_of(2)
    monkeypatch.setattr("torch.cuda.current_stream", lambda asked: {device: own}[asked])
    assert compat.engine_streams(device, forwards) == [1, 2]
    assert compat.engine_streams(device, None) == [1]
    own.cuda_stream = 2  # inside a forward
    assert compat.engine_streams(device, forwards) == [2]


def stream_of(handle: int) -> SimpleNamespace:
    return SimpleNamespace(cuda_stream=handle)


def test_hooks_take_and_are_set_once(harness):
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper

    harness()
    first = UnifiedCacheLinkerWrapper.match
    harness()
    assert UnifiedCacheLinkerWrapper.match is first


@pytest.mark.parametrize("target", compat.WEIGHT_CHANGES)
def test_every_way_to_change_weights_starts_a_generation(harness, target, monkeypatch):
    """Calls SGLang's hooked method on an object that has nothing to update: the hook runs first."""
    from pkgutil import resolve_name

    h = harness()
    before = h.store.namespace
    with pytest.raises((AttributeError, TypeError)):
        resolve_name(target)(object())
    assert h.store.namespace != before


def test_the_servers_state_shows_lmc(harness):
    h = harness()
    output = SimpleNamespace(internal_state={})
    assert compat._on_internal_state(lambda *_: output) is output
    assert output.internal_state["lmc"] == h.store.snapshot()
