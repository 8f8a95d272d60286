"""The time to first token of disk hits, and of unrelated requests beside them, on a disk of any
speed, against a real SGLang server with lmc.

    python -m tests.engines.bench_disk --out FOLDER

For each speed of the disk (`troubled_sglang.py` throttles reads), in turn:

    recompute   nothing of the prompt is stored
    load        all of it is on disk and nothing in RAM: the request is made to wait for it
    lmc         the same, lmc decides
    beside ...  a small unrelated request, sent 20 ms after the two

lmc should need no longer than the better of `recompute` and `load`. The first request after the
speed changed is the one that learns, as far as it does in the time that its chunks are held for it:
it is reported apart. After each request the disk is set free for a moment, from which lmc does not
learn, so that reads nobody waits for any more do not slow down the next.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.cli.machine import machine, versions
from tests.engines.models import model
from tests.engines.sglang_server import SglangServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.engines.server import Answer

SCRIPT = str(Path(__file__).with_name("troubled_sglang.py"))
TOKEN_BYTES = {"smollm2-135m": 46_080, "tiny-llama": 2048}
RATES_MB_S = (1, 2, 5, 10, 20, 30, 50, 100, None)
CHUNKS, CHUNK_TOKENS = 4, 256
RAM_SLOTS = 32
"""Half of it can be staged: also what requests let lie that did not wait is held for some time."""
STORED = 10
"""Prompts on disk, asked in turn: before one comes again the others have taken its place in RAM."""
ANSWER_TOKENS, SMALL_TOKENS, SMALL_DELAY_S = 4, 48, 0.02
LONGEST_LOAD_S, LEARN_S = 9.0, 11.0
"""lmc holds chunks for 10 s for a request that does not come for them."""
GOAL = 1.1


@dataclass
class Cell:
    """All samples of one kind at one speed."""

    ttft_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    disk_chunks: list[float] = field(default_factory=list)
    differing: int = 0

    def add(self, answer: Answer) -> None:
        self.ttft_s.append(answer.ttft_s)
        self.cached_tokens.append(answer.cached_tokens)

    @property
    def median_s(self) -> float:
        return statistics.median(self.ttft_s)

    def report(self) -> dict[str, Any]:
        return {
            "repeats": len(self.ttft_s),
            "median_s": round(self.median_s, 4) if self.ttft_s else None,
            "samples_s": [round(seconds, 4) for seconds in self.ttft_s],
            "cached_tokens": self.cached_tokens,
            "disk_chunks": self.disk_chunks,
            "differing_answers": self.differing,
        }


class Bench:
    def __init__(self, server: SglangServer, trouble: Path, token_bytes: int) -> None:
        self.server, self.trouble = server, trouble
        self._prompt_mb = CHUNKS * CHUNK_TOKENS * token_bytes / 1e6
        self._dice = random.Random(1)
        self._stored = [self._tokens(CHUNKS * CHUNK_TOKENS + 1) for _ in range(STORED)]
        self._expected: list[tuple[int, ...]] = []
        self._next = 0

    def prepare(self) -> None:
        """Warms up, and has all of lmc's prompts on disk."""
        self._set(learn=False)
        for _ in range(3):
            self.server.generate(self._tokens(CHUNKS * CHUNK_TOKENS + 1), ANSWER_TOKENS)
        for prompt in self._stored:
            self._settle()
            self._expected.append(self.server.generate(prompt, ANSWER_TOKENS).output_ids)
        for _ in range(RAM_SLOTS // CHUNKS):
            self._settle()
            self.server.generate(self._tokens(CHUNKS * CHUNK_TOKENS + 1), ANSWER_TOKENS)
        self._settle()

    def alone(self, repeats: int) -> Cell:
        cell = Cell()
        for _ in range(repeats):
            cell.add(self._small())
            self._settle()
        return cell

    def measure(self, rate: float | None, repeats: int) -> dict[str, Cell]:
        names = ("first", "recompute", "load", "lmc", "recompute+", "lmc+")
        cells = {name: Cell() for name in (*names, "beside recompute", "beside lmc")}
        self._hit(cells["first"], rate, learn=True)
        for _ in range(repeats):
            self._fresh(cells["recompute"], rate)
            if rate is None or self._prompt_mb / rate < LONGEST_LOAD_S:
                self._hit(cells["load"], rate, always_wait=True, learn=False)
            self._hit(cells["lmc"], rate)
            self._fresh(cells["recompute+"], rate, cells["beside recompute"])
            self._hit(cells["lmc+"], rate, beside=cells["beside lmc"])
        return cells

    # --- one request

    def _fresh(self, cell: Cell, rate: float | None, beside: Cell | None = None) -> None:
        self._set(read_mb_s=rate)
        self._ask(cell, self._tokens(CHUNKS * CHUNK_TOKENS + 1), beside)
        self._settle()

    def _hit(
        self, cell: Cell, rate: float | None, beside: Cell | None = None, **plan: bool
    ) -> None:
        number, self._next = self._next, (self._next + 1) % STORED
        before = self._disk_reads()
        self._set(read_mb_s=rate, **plan)
        answer = self._ask(cell, self._stored[number], beside)
        if plan.get("learn"):
            self._let_learn(before)
        self._settle()
        cell.disk_chunks.append(self._disk_reads() - before)
        cell.differing += answer.output_ids != self._expected[number]

    def _ask(self, cell: Cell, prompt: list[int], beside: Cell | None) -> Answer:
        with ThreadPoolExecutor(1) as another:
            asked = another.submit(self.server.generate, prompt, ANSWER_TOKENS)
            if beside is not None:
                time.sleep(SMALL_DELAY_S)
                beside.add(self._small())
            answer = asked.result()
        cell.add(answer)
        return answer

    def _small(self) -> Answer:
        return self.server.generate(self._tokens(SMALL_TOKENS), 1)

    def _let_learn(self, before: float) -> None:
        deadline = time.monotonic() + LEARN_S
        while self._disk_reads() < before + CHUNKS and time.monotonic() < deadline:
            time.sleep(0.1)

    def _settle(self) -> None:
        """What is still read comes at once, what is to be written is, there is room to stage the
        next prompt, and nothing stays on the device.
        """
        self._set(learn=False)
        seen, since, staged = -1.0, time.monotonic(), 0.0
        while time.monotonic() - since < 0.4 or staged > RAM_SLOTS // 2 - CHUNKS:
            state = self.server.lmc() or {}
            staged = state["staged_slots"]
            if (reads := disk_reads(state)) != seen:
                seen, since = reads, time.monotonic()
            time.sleep(0.1)
        self.server.drain()
        self.server.flush()

    # --- the disk

    def _set(self, **plan: float | None) -> None:
        aside = self.trouble.with_suffix(".new")
        aside.write_text(json.dumps({key: v for key, v in plan.items() if v is not None}))
        aside.replace(self.trouble)

    def _disk_reads(self) -> float:
        return disk_reads(self.server.lmc() or {})

    def _tokens(self, count: int) -> list[int]:
        return [self._dice.randrange(5, 1000) for _ in range(count)]


def disk_reads(state: Mapping[str, float]) -> float:
    return sum(count for name, count in state.items() if name.startswith(("disk.hit", "disk.miss")))


def row(rate: float | None, cells: Mapping[str, Cell]) -> dict[str, Any]:
    best = min(cell.median_s for name in ("recompute", "load") if (cell := cells[name]).ttft_s)
    return {
        "read_mb_s": rate,
        "ratio": round(cells["lmc"].median_s / best, 3),
        "first_ratio": round(cells["first"].median_s / best, 3),
        "cells": {name: cell.report() for name, cell in cells.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    tokens = CHUNKS * CHUNK_TOKENS
    lines = [
        f"{report['model']}, {tokens} tokens ({report['prompt_mb']:.1f} MB), "
        f"{report['machine']['cores']} cores, median of {report['repeats']} "
        f"(first after a change of speed: 1)",
        f"a small request alone: {report['small_alone']['median_s']:.3f} s",
        "",
        f"{'disk':>10}{'recompute':>11}{'load':>9}{'lmc':>9}{'from cache':>12}{'lmc/best':>10}"
        f"{'first':>9}{'first/best':>12}{'small beside: recompute':>25}{'lmc':>9}",
    ]
    for at in report["rates"]:
        cells = at["cells"]
        rate = "unlimited" if at["read_mb_s"] is None else f"{at['read_mb_s']:g} MB/s"
        recompute, load, lmc, first, beside_recompute, beside_lmc = (
            "-" if cells[name]["median_s"] is None else f"{cells[name]['median_s']:.2f} s"
            for name in ("recompute", "load", "lmc", "first", "beside recompute", "beside lmc")
        )
        cached = statistics.median(cells["lmc"]["cached_tokens"])
        mark = " " if at["ratio"] <= GOAL else "!"
        lines.append(
            f"{rate:>10}{recompute:>11}{load:>9}{lmc:>9}{cached:>12.0f}{at['ratio']:>9.2f}{mark}"
            f"{first:>9}{at['first_ratio']:>12.2f}{beside_recompute:>25}{beside_lmc:>9}"
        )
    cells = [cell for at in report["rates"] for cell in at["cells"].values()]
    differing = sum(cell["differing_answers"] for cell in cells)
    hits = [count for cell in cells for count in cell["disk_chunks"]]
    lines += [
        "",
        f"goal: lmc/best at most {GOAL}",
        f"{differing} of {len(hits)} hits answered other tokens than at first",
        f"{sum(count != CHUNKS for count in hits)} found other than {CHUNKS} chunks on disk",
    ]
    return "\n".join(lines)


def start(folder: Path, name: str, log: Path) -> tuple[SglangServer, Path]:
    trouble = folder / "trouble.json"
    trouble.write_text("{}")
    slot_bytes = CHUNK_TOKENS * TOKEN_BYTES[name] + 8192
    tiny = {"OMP_NUM_THREADS": "1"} if name.startswith("tiny") else {}
    server = SglangServer(
        model(name),
        log,
        flags=(
            *("--skip-tokenizer-init", "--page-size", "64"),
            *("--max-total-tokens", "8192", "--max-running-requests", "4"),
        ),
        environment={
            **tiny,
            "TROUBLE": str(trouble),
            "LMC_RAM_GB": str((RAM_SLOTS + 0.5) * slot_bytes / 1e9),
            "LMC_TIERS": f"file://{folder / 'chunks'}?gb={STORED * 3 * CHUNKS * slot_bytes / 1e9}",
        },
        launch=(SCRIPT,),
    )
    return server, trouble


def rate_of(text: str) -> float | None:
    return None if text in ("0", "unlimited") else float(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report and the log")
    parser.add_argument("--model", choices=TOKEN_BYTES, default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rates",
        type=rate_of,
        nargs="+",
        default=RATES_MB_S,
        metavar="MB/S",
        help="in the order they are set; 0 is a disk that is not throttled",
    )
    options = parser.parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    token_bytes = TOKEN_BYTES[options.model]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        server, trouble = start(Path(folder), options.model, out / "server-disk.log")
        with server:
            bench = Bench(server, trouble, token_bytes)
            bench.prepare()
            load_1min = os.getloadavg()[0]
            alone = bench.alone(options.repeats)
            rows = []
            for rate in options.rates:
                rows.append(row(rate, bench.measure(rate, options.repeats)))
                print(f"{rate or 'unlimited'} MB/s: lmc/best {rows[-1]['ratio']}", flush=True)
            lmc = server.lmc()
    report = {
        "model": options.model,
        "prompt_mb": CHUNKS * CHUNK_TOKENS * token_bytes / 1e6,
        "repeats": options.repeats,
        "goal": GOAL,
        "small_alone": alone.report(),
        "rates": rows,
        "load_1min_before": round(load_1min, 2),
        "lmc": lmc,
        "machine": machine(),
        "versions": versions(),
    }
    (out / "disk.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(report))
    print(f"\nall figures: {out / 'disk.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
