"""Anything, at any moment, on an engine that is short of everything: requests with shared prefixes
come and go, copies fail or take their time, the disk lies, weights change. What the model reads is
right all the while, answers are, and in the end nothing is held.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.request import RequestStatus

import lmc_vllm.scheduler
from lmc.testing import Fault, FaultyTier
from tests.integrations.vllm.fake import full, local, mamba, prompt, sliding
from tests.integrations.vllm.harness import SlowStores

ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (full(2), {"blocks": 40}),
    "full, late": (full(2), {"blocks": 40, "overlap": True, "late": "all"}),
    "full, two workers": (full(2), {"blocks": 40, "tp": 2}),
    "full, two stages": (full(2), {"blocks": 40, "pp": 2, "late": "last stage"}),
    "full, no cache": (full(2), {"blocks": 40, "caching": False}),
    "windows": (sliding(2, 100), {"blocks": 60}),
    "windows, late": (sliding(2, 100), {"blocks": 60, "overlap": True, "late": "all"}),
    "local": (local(2, 128), {"blocks": 60}),
    "states": (mamba(2, "align"), {"blocks": 24, "block": 64, "mamba_mode": "align"}),
    "states, late": (
        mamba(2, "align"),
        {
            "blocks": 24,
            "block": 64,
            "mamba_mode": "align",
            "overlap": True,
            "late": "all",
            "arguments": {"prefix_match_unit": 16, "prefix_cache_retention_interval": 64},
        },
    ),
}
FAULTS = [
    Fault(error=OSError(errno.EIO, "injected")),
    Fault(delay_s=0.003),
    Fault(lose=True),
    Fault(cut=5000),
    Fault(flip_bit=70_000),
    Fault(swap=True),
]
GONE = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_LENGTH_CAPPED)


class AnyMoment(RuleBasedStateMachine):
    build: Any  # set by the test
    places: Any

    @initialize(
        kind=st.sampled_from(sorted(ENGINES)),
        disk=st.booleans(),
        slots=st.integers(6, 40),
        slow=st.booleans(),
    )
    def start(self, kind: str, disk: bool, slots: int, slow: bool) -> None:
        specs, options = ENGINES[kind]
        self.tiers: list[FaultyTier] = []
        tiers = {"LMC_TIERS": f"file://{next(self.places)}?gb=1"} if disk else {}
        opened = lmc_vllm.scheduler.open_tiers

        def faulty(config: Any) -> list[FaultyTier]:
            found = [FaultyTier(tier) for tier in opened(config)]
            self.tiers += found
            return found

        lmc_vllm.scheduler.open_tiers = faulty
        try:
            self.one = type(self).build(
                specs,
                max_len=500,
                budget=150,
                seqs=6,
                extra={"ram_bytes": slots * 70_000},
                LMC_STAGE_WAIT_MS="20",
                **tiers,
                **options,
            )
        finally:
            lmc_vllm.scheduler.open_tiers = opened
        self.slow = SlowStores(self.one)
        self.slow.ended = not slow
        self.odd: set[str] = set()  # answers checked, or begun with other weights

    @rule(
        base=st.integers(0, 2),
        shared=st.integers(0, 300),
        own=st.integers(1, 120),
        answer=st.integers(1, 60),
        copies=st.integers(1, 3),
    )
    def ask(self, base: int, shared: int, own: int, answer: int, copies: int) -> None:
        ids = prompt(base, 300)[:shared] + prompt(1000 + own, own)
        for _ in range(copies):
            self.one.ask(ids, answer)

    @rule(count=st.integers(1, 25))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one.step()

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        """One that lives, if any. Who does depends on how fast copies are: no draw may."""
        if alive := self.alive():
            self.one.abort(alive[which % len(alive)])

    @rule(loads=st.integers(0, 2), stores=st.integers(0, 2))
    def copies_fail(self, loads: int, stores: int) -> None:
        for copies in self.one.copies:
            copies.failing_loads, copies.failing_stores = loads, stores

    @rule(steps=st.integers(1, 10))
    def loads_take_their_time(self, steps: int) -> None:
        self.one.copies[-1].may_load.clear()
        self.step(steps)
        self.one.copies[-1].may_load.set()

    @rule()
    def stores_end(self) -> None:
        self.slow.let_go()

    @rule(verb=st.sampled_from(["probe", "read", "write"]), fault=st.sampled_from(FAULTS))
    @precondition(lambda self: self.tiers)
    def the_disk_lies(self, verb: str, fault: Fault) -> None:
        for tier in self.tiers:
            tier.plan(verb, fault, times=3)

    @rule()
    def vllm_forgets(self) -> None:
        self.finish_all()
        self.one.forget()

    @rule()
    def weights_change(self) -> None:
        """As vLLM allows it while requests run: all of them begin again, but none that loads."""
        one = self.one
        while one.core.batch_queue or one.lmc._loading or one.scheduler.kv_holding_waiting:
            one.step()
        self.check_answers()
        self.odd |= set(self.alive())
        self.one.weights += 1
        self.one.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)

    def alive(self) -> list[str]:
        return [name for name, (request, _) in self.one.asked.items() if not request.is_finished()]

    def finish_all(self) -> None:
        slow, self.slow.ended = not self.slow.ended, True
        self.slow.let_go()
        self.one.settle()
        self.slow.ended = not slow
        assert not self.alive()
        self.check_answers()

    def check_answers(self) -> None:
        """Of requests that ended since the last call."""
        for name, (request, _) in self.one.asked.items():
            if request.is_finished() and name not in self.odd:
                assert request.status in GONE, f"{name} ended as {request.status}"
                if request.status is GONE[1]:
                    self.one.check_answer(name)
                self.odd.add(name)

    def teardown(self) -> None:
        if not hasattr(self, "one"):
            return
        try:
            if not self.one.broken:
                self.finish_all()
        finally:
            self.slow.end()
            self.one.close()


def run(engine, tmp_path_factory, examples: int, steps: int) -> None:
    def places():
        while True:
            yield tmp_path_factory.mktemp("tier")

    machine = type("AnyMoment", (AnyMoment,), {"build": engine, "places": places()})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=examples < 100,
            print_blob=True,
        ),
    )


def test_anything_at_any_moment(engine, tmp_path_factory):
    run(engine, tmp_path_factory, examples=40, steps=20)


@pytest.mark.slow
def test_anything_at_any_moment_for_long(engine, tmp_path_factory):
    run(engine, tmp_path_factory, examples=500, steps=40)
