"""What time tells one tenant of another's prompts, with SGLang's real cache and no model.

    pytest tests/integrations/test_bench_tenants.py --benchmark-enable -s

An attacker asks for prompts, of which the victim stored every second one, in random order, and
times how soon lmc's part is over. Printed is the area under the attacker's ROC curve (AUC): 0.5
tells nothing, 1.0 all. Beside it what chance alone does (two standard errors), and what the same
attacker would see without a salt between them. Target: at most 0.55.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.integrations.auc import auc
from tests.integrations.harness import tokens

VICTIM, ATTACKER = {"cache_salt": "victim"}, {"cache_salt": "attacker"}
PARTS = ("arrival", "match", "both")
LENGTH = 193
"""Tokens of a prompt: three chunks, and one to compute."""


def probe(harness, prompt, who) -> dict[str, float]:
    started = time.perf_counter()
    req = harness.arrive(prompt, **who)
    arrived = time.perf_counter()
    match = harness.match(req)  # waits for what is on its way from disk
    found = time.perf_counter()
    harness.linker.request_aborted(req.rid)
    harness.step()
    assert bool(match.host_hit_length) <= (who is VICTIM)
    return dict(zip(PARTS, (arrived - started, found - arrived, found - started), strict=True))


@pytest.mark.parametrize("tiers", ["RAM", "RAM and disk"])
def test_what_time_tells_an_attacker(harness, benchmark, tmp_path, tiers):
    """With RAM alone, and with disk where RAM has lost most of what the victim stored."""
    num = 4000 if benchmark.enabled else 40
    lower = {"LMC_TIERS": f"file://{tmp_path}/tier"} if tiers != "RAM" else {}
    room = "0.02" if lower else str(max(0.02, num * LENGTH * 2100 / 2 / 1e9))
    h = harness(LMC_CHUNK_TOKENS="64", LMC_RAM_GB=room, **lower)
    asked = [tokens(seed, LENGTH) for seed in range(num)]
    for prompt in asked[::2]:
        h.run(prompt, **VICTIM)
        h.settle()
        h.store.drain(10)
        h.flush()

    def ask(who) -> dict[str, float]:
        order = list(range(num))
        random.Random(num).shuffle(order)
        for i in order[: num // 10]:  # warm
            probe(h, tokens(num + i, LENGTH), who)
        taken = {i: probe(h, asked[i][:], who) for i in order}  # its own copy: caches know none
        return {
            part: auc(*([taken[i][part] for i in order if i % 2 == odd] for odd in (0, 1)))
            for part in PARTS
        }

    told = benchmark.pedantic(ask, args=(ATTACKER,), rounds=1)
    chance = 2 * ((num + 1) / (12 * (num / 2) ** 2)) ** 0.5
    unsalted = ask(VICTIM)
    for part in PARTS:
        benchmark.extra_info[part] = round(told[part], 4)
        print(
            f"\n{tiers}, {num} probes, {part}: AUC {told[part]:.4f} (0.5 +- {chance:.4f} is chance;"
            f" {unsalted[part]:.4f} within a salt)"
        )
