"""The tier that goes wrong on request does so, as often as it was told and no more."""

from __future__ import annotations

import threading
import time

import pytest

from lmc.testing import Fault, FaultyTier, MemoryTier
from lmc.testing.contract import blob_of, buffer, name_of
from tests.core.chunks import EIO, wait_until

A, B = name_of("a"), name_of("b")


@pytest.fixture
def tier() -> FaultyTier:
    tier = FaultyTier(MemoryTier())
    tier.write(A, blob_of(A))
    tier.write(B, blob_of(B))
    tier.calls.clear()
    return tier


def read(tier: FaultyTier) -> bytes:
    into = buffer()
    return bytes(into[: tier.read(A, into)])


def test_errors_as_many_as_planned(tier: FaultyTier) -> None:
    tier.plan("read", Fault(error=EIO), times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="injected"):
            read(tier)
    assert read(tier) == blob_of(A)
    assert tier.calls["read"] == 3


def test_faults_in_the_order_they_were_planned_until_healed(tier: FaultyTier) -> None:
    tier.plan("read", Fault(cut=5))
    tier.plan("read", Fault(lose=True), times=None)
    assert [len(read(tier)) for _ in range(4)] == [5, 0, 0, 0]
    tier.heal()
    assert read(tier) == blob_of(A)


@pytest.mark.parametrize("verb", ["probe", "read", "write", "hottest", "forget", "close"])
def test_every_verb_can_fail(tier: FaultyTier, verb: str) -> None:
    tier.plan(verb, Fault(error=EIO))
    calls = {
        "probe": lambda: tier.probe([A]),
        "read": lambda: read(tier),
        "write": lambda: tier.write(A, blob_of(A)),
        "hottest": lambda: tier.hottest(1),
        "forget": lambda: tier.forget(A),
        "close": tier.close,
    }
    with pytest.raises(OSError, match="injected"):
        calls[verb]()
    calls[verb]()
    assert tier.calls == {verb: 2}


def test_flipped_bit_read_and_kept(tier: FaultyTier) -> None:
    wrong = bytearray(blob_of(A))
    wrong[2] ^= 8
    tier.plan("read", Fault(flip_bit=19))
    assert read(tier) == wrong
    assert read(tier) == blob_of(A)
    tier.forget(A)
    tier.plan("write", Fault(flip_bit=19))
    tier.write(A, blob_of(A))
    assert read(tier) == wrong


def test_flipped_bit_of_nothing(tier: FaultyTier) -> None:
    tier.plan("read", Fault(flip_bit=19, cut=0))
    assert read(tier) == b""


def test_cut_and_lost_writes(tier: FaultyTier) -> None:
    tier.forget(A)
    tier.plan("write", Fault(lose=True))
    tier.write(A, blob_of(A))
    assert read(tier) == b""
    tier.plan("write", Fault(cut=100))
    tier.write(A, blob_of(A))
    assert read(tier) == blob_of(A)[:100]


def test_swapped_and_hidden(tier: FaultyTier) -> None:
    tier.plan("read", Fault(swap=True))
    assert read(tier) == blob_of(B)
    tier.plan("probe", Fault(lose=True))
    assert tier.probe([A]) == 0
    assert tier.probe([A]) == 1
    tier.plan("forget", Fault(lose=True))
    tier.forget(A)
    assert read(tier) == blob_of(A)


def test_delay_and_hang(tier: FaultyTier) -> None:
    tier.plan("read", Fault(delay_s=0.02))
    started = time.monotonic()
    assert read(tier) == blob_of(A)
    assert time.monotonic() - started >= 0.02
    hang, got = threading.Event(), []
    tier.plan("read", Fault(hang=hang))
    thread = threading.Thread(target=lambda: got.append(read(tier)))
    thread.start()
    wait_until(lambda: tier.calls["read"] == 2)
    assert read(tier) == blob_of(A)  # only that call hangs
    assert got == []
    hang.set()
    thread.join(10)
    assert got == [blob_of(A)]


def test_unknown_verb_is_refused_by_name(tier: FaultyTier) -> None:
    with pytest.raises(ValueError, match="'open' is not a verb of a tier; choices: probe, read"):
        tier.plan("open", Fault())
