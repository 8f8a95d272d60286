"""Requests wait for chunks on their way up while others go on, and no longer than that pays."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from lmc_sglang import compat, patience
from lmc_sglang.patience import Outlook, Patience, Wait
from tests.integrations.harness import tokens
from tests.integrations.test_linker import assert_nothing_held, stored

MB = 1 << 20


# --- what is worth waiting for


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(patience, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def outlook(arrived=0, remaining=8, **more) -> Outlook:
    """Chunks of 1 MB and 256 tokens, four read at a time."""
    fields = {"at_once": 4 * MB, "unknown": False, **more}
    tokens = 256 * remaining
    return Outlook(arrived * MB, remaining * MB, tokens=tokens, all_tokens=2048, **fields)


def waited(clock, judge, wait, found, *, most=100.0) -> float:
    """Seconds until a request stops waiting for what does not come."""
    started = clock.now
    while judge.waits(wait, found) and clock.now - started < most:
        clock.now += 0.001
    return clock.now - started


def patient(clock, prefill=0.0, staging=0.0, longest=0.5) -> tuple[Patience, Wait]:
    judge = Patience(longest)
    judge.prefill.value, judge.staging.value = prefill, staging
    return judge, Wait(started=clock.now)


def test_where_nothing_is_known_it_waits_as_long_as_chunks_come(clock):
    judge, wait = patient(clock)
    for arrived in range(8):
        assert judge.waits(wait, outlook(arrived, 8 - arrived))
        clock.now += 0.4
    assert waited(clock, judge, wait, outlook(8, 1)) == pytest.approx(0.5, abs=0.01)


def test_a_tier_known_to_be_slower_than_prefill_is_not_waited_for(clock):
    judge, wait = patient(clock, prefill=1000, staging=2 * MB)  # 512 tokens/s
    assert not judge.waits(wait, outlook())
    judge, wait = patient(clock, prefill=1000, staging=8 * MB)
    assert judge.waits(wait, outlook())


def test_a_tier_that_turns_out_slower_is_given_up(clock):
    """Nothing came in the time in which half of what is under way would have had to."""
    judge, wait = patient(clock, prefill=1000, staging=100 * MB, longest=60)
    assert waited(clock, judge, wait, outlook()) == pytest.approx(0.512, abs=0.01)


def test_only_the_first_waits_in_vain(clock):
    """Until something comes: what is on its way may take long, and teaches only then."""
    judge, wait = patient(clock, prefill=1000, longest=60)
    assert waited(clock, judge, wait, outlook()) == pytest.approx(0.512, abs=0.01)
    judge.prefill.value = 900  # never quite the same
    assert not judge.waits(Wait(started=clock.now), outlook())
    judge.landed(wait, 0, clock.now)  # all was lost
    assert not judge.waits(Wait(started=clock.now), outlook())
    judge.landed(wait, 100 * MB, clock.now)
    assert judge.waits(Wait(started=clock.now), outlook())


def test_chunks_of_a_slow_disk_may_take_longer_than_the_setting_says(clock):
    """Known to bring four of them in a second, where all eight take four to compute."""
    judge, wait = patient(clock, prefill=512, staging=4 * MB, longest=0.5)
    clock.now += 0.9
    assert judge.waits(wait, outlook())
    clock.now += 0.2
    assert judge.waits(wait, outlook(arrived=4, remaining=4))


def test_nobody_waits_longer_than_it_takes_to_compute_all(clock):
    """However well it goes: the estimate may be wrong."""
    judge, wait = patient(clock, prefill=1000, longest=60)
    clock.now += 2.05
    assert not judge.waits(wait, outlook(arrived=7, remaining=1))


def test_to_hear_what_there_is_takes_a_part_of_that_at_most(clock):
    judge, wait = patient(clock, prefill=1000, longest=60)
    assert waited(clock, judge, wait, outlook(remaining=0, unknown=True)) < 0.21


def test_to_hear_what_else_is_needed_all_that_has_come_is_at_stake(clock):
    judge, wait = patient(clock, prefill=1000, longest=60)
    found = outlook(arrived=8, remaining=0, unknown=True)
    assert waited(clock, judge, wait, found) == pytest.approx(2.048, abs=0.01)


@pytest.mark.parametrize("staging", [0.0, MB])
def test_where_nothing_comes_nobody_waits(clock, staging):
    judge, wait = patient(clock, prefill=1000, staging=staging)
    assert not judge.waits(wait, outlook(remaining=0))


def test_who_has_stopped_waiting_does_not_begin_again(clock):
    judge, wait = patient(clock, prefill=1000, staging=MB)
    assert not judge.waits(wait, outlook())
    judge.staging.value = 1000 * MB
    assert not judge.waits(wait, outlook())


def test_without_patience_nobody_waits(clock):
    judge, wait = patient(clock, longest=0)
    assert not judge.waits(wait, outlook())


def test_rates_are_learned(clock):
    judge, wait = patient(clock)
    clock.now += 2
    judge.landed(wait, 8 * MB, clock.now)
    assert judge.staging.value == 4 * MB
    judge.prefill.add(1000, 1.0)
    judge.prefill.add(2000, 1.0)
    assert 1000 < judge.prefill.value < 2000


# --- in the scheduler


class SlowTier:
    """The first tier below RAM, whose reads wait for a word."""

    def __init__(self, h) -> None:
        self.go = threading.Event()
        self.reads = 0
        tier = h.store._guards[0]._tier
        read = tier.read

        def waits(name, into):
            self.reads += 1
            return self.go.wait(20) and read(name, into)

        tier.read = waits


def waiting(harness, tmp_path, **settings):
    place = f"file://{tmp_path}?gb=1"
    stored(harness, 1000, LMC_TIERS=place).close()
    h = harness(cold=True, LMC_TIERS=place, **settings)
    return h, SlowTier(h)


def admission(h, req, *others) -> object:
    """The scheduler's question, with `others` in the batch or running."""
    adder = SimpleNamespace(can_run_list=list(others), running_batch=None, tree_cache=h.cache)

    def orig(adder, req, *_):
        adder.can_run_list.append(req)
        return AddReqResult.OTHER

    req.kv = SimpleNamespace(holds_mamba=False)
    return compat._on_admission(orig, adder, req, False, None)


def test_a_request_is_passed_over_until_its_chunks_are_here(harness, tmp_path):
    h, tier = waiting(harness, tmp_path)
    req, other = h.arrive(tokens(1, 1000)), h.arrive(tokens(2, 1000))
    for _ in range(3):
        h.step()
        assert h.match(req).host_hit_length == 0
        assert admission(h, req) is AddReqResult.CONTINUE
        h.match(other)
        assert admission(h, other) is AddReqResult.OTHER, "it goes on meanwhile"
    tier.go.set()
    match = h.admit(req)
    assert match.host_hit_length == 960
    assert admission(h, req) is AddReqResult.OTHER
    h.serve(h.load(req, match))


def test_who_runs_without_what_was_staged_for_it_lets_that_go(harness, tmp_path):
    """It had a part of RAM for itself that nobody else could use."""
    h, tier = waiting(harness, tmp_path)
    tier.go.set()
    req = h.arrive(tokens(1, 1000))
    assert h.store.drain(10)
    assert h.store.snapshot()["staged_slots"] > 0
    assert admission(h, req) is AddReqResult.OTHER
    h.step()  # what it was promised in this pass
    assert_nothing_held(h)


def test_the_hook_is_on_sglangs_own_adder(harness):
    harness()
    assert hasattr(PrefillAdder.add_one_req, "__wrapped__")


def test_a_tier_that_hangs_is_waited_for_a_bounded_while(harness, tmp_path):
    h, tier = waiting(harness, tmp_path, LMC_STAGE_WAIT_MS="50")
    req = h.arrive(tokens(1, 1000))
    started = time.monotonic()
    match = h.admit(req)
    assert match.host_hit_length == 0
    assert time.monotonic() - started < 5
    tier.go.set()
    assert h.store.drain(10)
    assert h.match(req).host_hit_length == 960, "it arrived after all"


def landed(h, monkeypatch) -> list[tuple[int, float]]:
    """What is learned of the tiers from now on: bytes, and when they were there."""
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(h.linker._patience, "landed", lambda _, size, at: seen.append((size, at)))
    return seen


def wait_until_read(h, count) -> float:
    """Without looking at what came; a time at which all of it was there."""
    hit = h.store._done._done
    deadline = time.monotonic() + 20
    while hit.qsize() < count and time.monotonic() < deadline:
        time.sleep(0.001)
    return time.monotonic()


def test_a_tier_is_as_fast_as_it_was_however_late_one_looks(harness, tmp_path, monkeypatch):
    """A request that was given up is computed meanwhile: a tier would never seem faster than that,
    and nobody would wait for it again.
    """
    h, tier = waiting(harness, tmp_path, LMC_STAGE_WAIT_MS="0")
    seen = landed(h, monkeypatch)
    req = h.arrive(tokens(1, 1000))
    while h.linker._arrivals[req.rid].tickets[0].planning:
        h.step()
    tier.go.set()
    there = wait_until_read(h, 4)
    time.sleep(0.01)
    h.step()
    [(size, at)] = seen
    assert size == 4 * h.store.arena.slot_bytes
    assert at <= there


def test_what_comes_for_a_request_that_went_on_with_less_is_measured_too(
    harness, tmp_path, monkeypatch
):
    h, tier = waiting(harness, tmp_path)
    seen = landed(h, monkeypatch)
    req = h.arrive(tokens(1, 1000))
    ticket = h.linker._arrivals[req.rid].tickets[0]
    while tier.reads < 4:
        h.step()
    h.linker._forget_arrival(req.rid)
    h.step()
    assert not seen
    tier.go.set()
    while ticket.reading:
        h.step()
    h.step()
    assert [size for size, _ in seen] == [4 * h.store.arena.slot_bytes]
    assert_nothing_held(h)


def test_no_call_of_the_scheduler_waits_for_a_tier(harness, tmp_path):
    """But the nap of an idle engine, which ends with the first chunk."""
    h, tier = waiting(harness, tmp_path, LMC_STAGE_WAIT_MS="60000")
    req = h.arrive(tokens(1, 1000))
    for _ in range(50):
        h.step()
        h.match(req)
    longest = max(
        h.store.stats.snapshot()[f"scheduler.{call}.seconds"] for call in ("lookup", "arrival")
    )
    assert longest < 1
    assert h.linker.passes_over(req.rid)
    tier.go.set()
    h.serve(h.load(req, h.admit(req)))


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(harness, tmp_path):
    h, tier = waiting(harness, tmp_path)
    req = h.arrive(tokens(1, 1000))
    h.step()
    h.match(req)
    assert h.linker.passes_over(req.rid)
    h.cache.linker.release_request(req.rid)
    assert not h.linker.passes_over(req.rid)
    tier.go.set()
    assert h.store.drain(10)
    assert_nothing_held(h)


def test_one_rank_that_waits_holds_all_of_them(harness, monkeypatch):
    """The bit rides on the reduction: here the other rank says that it waits, or does not."""
    h = stored(harness, 1000)
    reduce = h.cache._all_reduce_attn_groups
    for other in (0, 1):

        def reduced(mask, op, other=other):
            reduce(mask, op)
            if mask.numel() > 1:
                assert mask[0] == 1, "this rank does not wait"
                mask[0] = min(int(mask[0]), other)

        monkeypatch.setattr(h.cache, "_all_reduce_attn_groups", reduced)
        req = h.arrive(tokens(1, 1000))
        assert h.match(req).host_hit_length == 960, "the bit is no length"
        assert h.linker.passes_over(req.rid) == (other == 0)
        assert h.cache._all_reduce_attn_groups is reduced
        h.cache.linker.release_request(req.rid)


def test_identical_requests_are_loaded_once(harness):
    """The others wait until the first has inserted what it loaded, and find it on the device."""
    h = stored(harness, 1000)
    ids = tokens(1, 1000)
    first, *others = [h.arrive(ids) for _ in range(64)]
    h.step()
    match = h.match(first)
    index = h.load_back(first, match)
    for req in others:
        h.match(req)
        assert admission(h, req) is AddReqResult.CONTINUE
    h.linker.layer_done_counter.set_consumer(index)
    slots = h.cache.linker.private_load_indices[first.rid]
    assert h.cache.linker.finish_loads() == []
    rest = h.alloc_tokens(0)
    h.insert(ids, torch.cat([slots, rest]))
    for req in others:
        h.step()
        found = h.match(req)
        assert (found.device_prefix_len, found.host_hit_length) == (960, 0)
        assert not h.linker.passes_over(req.rid)
    assert h.store.stats.snapshot()["pages.loaded"] == 960 // 64


def test_a_twin_that_goes_away_is_not_waited_for_for_long(harness):
    h = stored(harness, 1000)
    first, other = h.arrive(tokens(1, 1000)), h.arrive(tokens(1, 1000))
    h.step()
    h.load_back(first, h.match(first))
    h.match(other)
    assert h.linker.passes_over(other.rid)
    assert h.cache.linker.finish_loads() == []
    passes = 0
    while h.match(other).host_hit_length and h.linker.passes_over(other.rid):
        h.step()
        passes += 1
    assert 0 < passes <= 60
    h.serve(h.load(other, h.match(other)))


def test_prefill_is_measured_from_batch_to_batch(harness, monkeypatch):
    h = harness()
    now = [10.0]
    monkeypatch.setattr(compat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(compat, "_last_result", 0.0)
    seen = []
    monkeypatch.setattr(h.linker, "prefilled", lambda n, s: seen.append((n, round(s, 3))))
    extend = SimpleNamespace(is_extend=lambda: True)
    decode = SimpleNamespace(is_extend=lambda: False)

    def over(launched, ended, mode, count):
        now[0] = ended
        batch = SimpleNamespace(launch_ts=launched, forward_mode=mode, extend_num_tokens=count)
        compat._on_result(lambda *_: None, None, batch, None)

    over(9.0, 10.0, extend, 500)
    over(9.5, 10.5, extend, 250)  # launched while the other ran
    over(10.5, 10.6, decode, 4)
    over(11.0, 11.5, extend, 100)
    assert seen == [(500, 1.0), (250, 0.5), (100, 0.5)]
