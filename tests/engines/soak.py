"""Random requests, aborts, flushes, weight updates and trouble below RAM, against a real SGLang
server with lmc, for as long as it is told; then nothing may be lost, wrong or left behind.

    python -m tests.engines.soak --minutes 30
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.models import model
from tests.engines.server import ServerError
from tests.engines.sglang_server import SglangServer

if TYPE_CHECKING:
    from collections.abc import Sequence

SCRIPT = str(Path(__file__).with_name("troubled_sglang.py"))
CLIENTS = 6
PROMPTS = 60
ANSWER = 6
TROUBLES: tuple[dict[str, float], ...] = (
    {},
    {"errors": 0.3},
    {"flips": 0.2},
    {"cuts": 0.2},
    {"losses": 0.3},
    {"read_mb_s": 2},
    {"hangs_s": 8, "errors": 0.05},
    {"errors": 0.1, "flips": 0.1, "cuts": 0.1, "losses": 0.1},
)


@dataclass
class Report:
    """What happened. Wrong tokens and failed requests are listed, the rest is counted."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class Soak:
    def __init__(self, server: SglangServer, trouble: Path, seed: int = 1) -> None:
        self.server, self.trouble = server, trouble
        self.report = Report()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._calm = threading.Condition(self._lock)
        self._busy = 0
        self._pausing = False
        documents = [self._tokens(1200, 100 + i) for i in range(8)]
        self.prompts = [
            self._random.choice(documents)[: self._random.randrange(1, 1200)]
            + self._tokens(self._random.randrange(1, 200), 1000 + i)
            for i in range(PROMPTS)
        ]
        self.expected: list[tuple[int, ...]] = []

    @staticmethod
    def _tokens(n: int, seed: int) -> list[int]:
        source = random.Random(seed)
        return [source.randrange(5, 1000) for _ in range(n)]

    def learn(self) -> None:
        """What the engine answers, one prompt at a time."""
        for prompt in self.prompts:
            self.expected.append(self.server.generate(prompt, ANSWER).output_ids)

    def run(self, seconds: float) -> Report:
        end = time.monotonic() + seconds
        clients = [
            threading.Thread(target=self._ask, args=(end, random.Random(i))) for i in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            self._disturb(end)
        finally:
            for client in clients:
                client.join(600)
        self.trouble.write_text("{}")
        self._check()
        return self.report

    # --- clients

    def _ask(self, end: float, dice: random.Random) -> None:
        while time.monotonic() < end:
            with self._calm:
                while self._pausing:
                    self._calm.wait(1)
                self._busy += 1
            try:
                self._one(dice)
            except (ServerError, OSError) as error:
                with self._lock:
                    self.report.failed.append(str(error)[:300])
            finally:
                with self._calm:
                    self._busy -= 1
                    self._calm.notify_all()

    def _one(self, dice: random.Random) -> None:
        number = dice.randrange(PROMPTS)
        prompt = self.prompts[number]
        if dice.random() < 0.2:  # hang up, at any time
            answer = self.server.stream(prompt, 200)
            for _ in range(dice.randrange(1, 12)):
                next(answer, None)
            answer.close()
            kind = "vanished"
        else:
            found = self.server.generate(prompt, ANSWER)
            kind = "answered"
            if found.output_ids != self.expected[number]:
                with self._lock:
                    self.report.wrong.append(
                        f"prompt {number}: {found.output_ids} for {self.expected[number]}, "
                        f"{found.cached_tokens} cached"
                    )
            with self._lock:
                self.report.done["cached tokens"] += found.cached_tokens
        with self._lock:
            self.report.done[kind] += 1

    # --- what disturbs them

    def _disturb(self, end: float) -> None:
        """New weights come in the last part: from then on lmc leaves the disk alone."""
        dice = self._random
        started = time.monotonic()
        weights_from = end - (end - started) * 0.2
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, dice.uniform(0.5, 2.0)))
            what = dice.choice(("trouble", "trouble", "flush", "flush", "weights"))
            if what == "weights" and time.monotonic() < weights_from:
                what = "flush"
            if what == "trouble":
                self.trouble.write_text(json.dumps(dice.choice(TROUBLES)))
            elif what == "flush":
                with self._pause():
                    self.server.flush()
            else:
                body = {"model_path": str(model("tiny-llama"))}
                with self._pause():
                    self.server.flush()  # who hung up may still run
                    self.server.call("POST", "/update_weights_from_disk", body)
            with self._lock:
                self.report.done[what] += 1
            self.report.memory_mb.append(memory_mb(self.server.process.pid))

    @contextlib.contextmanager
    def _pause(self) -> Any:
        """Let clients finish what they began: SGLang flushes when it is idle."""
        with self._calm:
            self._pausing = True
            while self._busy:
                self._calm.wait(1)
        try:
            yield
        finally:
            with self._calm:
                self._pausing = False
                self._calm.notify_all()

    # --- the end

    def _check(self) -> None:
        self.server.flush()
        self.report.state = settled(self.server)

    def problems(self) -> list[str]:
        """What must not be; nothing if all went well."""
        report, found = self.report, []
        found += [f"wrong tokens: {text}" for text in report.wrong[:5]]
        found += [f"a request failed: {text}" for text in report.failed[:5]]
        if not is_quiet(report.state):
            found.append(f"slots are missing, or something is still held: {report.state}")
        memory = report.memory_mb
        third = len(memory) // 3
        if third > 10:
            early, late = max(memory[third : 2 * third]), max(memory[2 * third :])
            if late > early * 1.1 + 50:
                found.append(f"memory grows: {early:.0f} MB, then {late:.0f} MB")
        return found


def settled(server: SglangServer, timeout_s: float = 60.0) -> dict[str, Any]:
    """lmc's counters once nothing is under way or held any more, or as they are after a while."""
    deadline = time.monotonic() + timeout_s
    while not is_quiet(state := server.lmc() or {}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return state


def is_quiet(state: dict[str, Any]) -> bool:
    slots = state.get("ram.free_slots", 0) + state.get("ram.idle_slots", 0)
    return bool(
        state
        and slots == state["ram.slots"]
        and not state["staged_slots"]
        and not state["warming"]
        and not state["spill_queue_bytes"]
    )


def memory_mb(pid: int) -> float:
    """Resident memory of a process and all below it."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            group = (status.parent / "stat").read_text().rpartition(")")[2].split()[2]
            if int(group) == pid:
                total += int(fields.get("VmRSS", "0 kB").split()[0]) / 1000
    return total


def start(folder: Path, flags: Sequence[str] = ()) -> tuple[SglangServer, Path]:
    """A tiny model in little memory, and the file for its disk's trouble."""
    trouble = folder / "trouble.json"
    trouble.write_text("{}")
    sizes = ("--max-total-tokens", "4096", "--max-running-requests", "6")
    server = SglangServer(
        model("tiny-llama"),
        folder / "server.log",
        flags=("--skip-tokenizer-init", *sizes, "--chunked-prefill-size", "320", *flags),
        environment={
            "OMP_NUM_THREADS": "1",
            "TROUBLE": str(trouble),
            "LMC_RAM_GB": "0.02",
            "LMC_MODEL_VERSION": "soak",
            "LMC_TIERS": f"file://{folder / 'chunks'}?gb=0.1",
            "LMC_STAGE_WAIT_MS": "300",
        },
        launch=(SCRIPT,),
    )
    return server, trouble


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, trouble = start(Path(folder))
        with server:
            soak = Soak(server, trouble, options.seed)
            soak.learn()
            report = soak.run(options.minutes * 60)
    print(json.dumps({"done": report.done, "state": report.state}, indent=1))
    memory = report.memory_mb
    print(f"memory: {memory[0]:.0f} MB at first, {max(memory):.0f} at most, {memory[-1]:.0f} last")
    for problem in soak.problems():
        print(f"PROBLEM: {problem}")
    return bool(soak.problems())


if __name__ == "__main__":
    sys.exit(main())
