"""The contract with SGLang: everything lmc rests on is there, and what is not is named."""

from __future__ import annotations

import pytest
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from lmc_sglang import compat


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


def test_a_new_duty_of_linkers_is_named(monkeypatch):
    duties = UnifiedCacheLinker.__abstractmethods__ | {"prefetch"}
    monkeypatch.setattr(UnifiedCacheLinker, "__abstractmethods__", duties)
    with pytest.raises(RuntimeError, match="linker method prefetch"):
        compat.check()


def test_an_untested_release_only_warns(monkeypatch, caplog):
    monkeypatch.setattr(compat, "TESTED", ("0.0.1",))
    compat.check()
    assert "was tested with 0.0.1" in caplog.text


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
    from types import SimpleNamespace

    h = harness()
    output = SimpleNamespace(internal_state={})
    assert compat._on_internal_state(lambda *_: output) is output
    assert output.internal_state["lmc"] == h.store.snapshot()
