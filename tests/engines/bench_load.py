"""Sixteen chats at once about a few shared documents, against a real SGLang server whose pool is
too small for them, without lmc and with it, and against one in whose pool everything fits.

    python -m tests.engines.bench_load --out FOLDER

One server after the other, the same chats each time: every turn is asked once the turn before was
answered, so the servers set the pace. Answers go into the next prompt, as in a real chat. All are
greedy; a low bit that differs may flip a token, hence tokens are compared and differences counted:
`flipped` had the same prompt, `followed` came later in such a chat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.cli.machine import machine, versions
from tests.engines.models import model
from tests.engines.server import Answer, ServerError
from tests.engines.sglang_server import SglangServer

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "smollm2-135m"
TEXT = Path(__file__).resolve().parents[2] / "ci" / "data" / "reading.txt"
SYSTEM_TOKENS, DOCUMENT_TOKENS, ANSWER_TOKENS = 300, 1000, 16
RAM_GB = 2.0
COLORS = {"small": "#b0b0b0", "small+lmc": "#2a78c2", "large": "#d8d8d8"}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. `pool` is too small for it, `large_pool` holds all of it."""

    chats: int = 16
    turns: int = 4
    documents: int = 6
    pool: int = 4096
    large_pool: int = 24_576
    think_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    prompt: tuple[int, ...]
    answer: Answer


class Chats:
    """The same texts in every process, in the chat format of the model."""

    def __init__(self, folder: Path, load: Load) -> None:
        from tokenizers import Tokenizer

        self.load = load
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._sentences = TEXT.read_text().replace("\n", " ").split(". ")
        system = self._text(0, SYSTEM_TOKENS)
        self._first = [
            self._encode("<|im_start|>system\n")
            + system
            + self._encode("<|im_end|>\n<|im_start|>user\n")
            + self._text(1 + document, DOCUMENT_TOKENS)
            for document in range(load.documents)
        ]

    def run(self, server: SglangServer) -> tuple[list[list[Turn]], float]:
        """All chats at once: their turns, and the seconds it took."""
        answered: list[list[Turn]] = [[] for _ in range(self.load.chats)]
        errors: list[Exception] = []

        def hold(chat: int) -> None:
            try:
                self._hold(server, chat, answered[chat])
            except (ServerError, OSError) as error:
                errors.append(error)

        threads = [threading.Thread(target=hold, args=(i,)) for i in range(self.load.chats)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if errors:
            raise errors[0]
        return answered, seconds

    def _hold(self, server: SglangServer, chat: int, turns: list[Turn]) -> None:
        dice = random.Random(chat)
        prompt = list(self._first[chat % self.load.documents])
        for turn in range(self.load.turns):
            time.sleep(dice.uniform(0, 2 * self.load.think_s))
            prompt += self._encode(self._question(dice, turn))
            answer = server.generate(prompt, ANSWER_TOKENS)
            turns.append(Turn(tuple(prompt), answer))
            prompt += answer.output_ids

    def _question(self, dice: random.Random, turn: int) -> str:
        words = " ".join(dice.choice(self._sentences).split()[:8])
        begin = "<|im_end|>\n<|im_start|>user\n" if turn else "\n\n"
        return (
            f'{begin}What is meant by "{words}"? Answer in one sentence.'
            f"<|im_end|>\n<|im_start|>assistant\n"
        )

    def _text(self, seed: int, num_tokens: int) -> list[int]:
        """Sentences in an order of their own, cut to length."""
        order = self._sentences.copy()
        random.Random(seed).shuffle(order)
        return self._encode(". ".join(order))[:num_tokens]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def measure(name: str, chats: Chats, out: Path) -> tuple[dict[str, Any], list[list[Turn]]]:
    load = chats.load
    pool = load.large_pool if name == "large" else load.pool
    flags = ["--max-total-tokens", str(pool), "--max-running-requests", str(load.chats)]
    flags += ["--page-size", "64"]
    settings = {"LMC_ENABLE": "1", "LMC_RAM_GB": str(RAM_GB)} if name == "small+lmc" else {}
    log = out / f"server-{name}.log"
    with SglangServer(model(MODEL), log, flags=flags, environment=settings) as server:
        for _ in range(2):
            warm_up(server)
        print(f"{name}: {load.chats} chats of {load.turns} turns", flush=True)
        load_1min = os.getloadavg()[0]
        answered, seconds = chats.run(server)
        lmc = server.lmc()
        server.kill()  # at once: nothing in it is needed any more
    turns = list(itertools.chain.from_iterable(answered))
    ttft_s = [turn.answer.ttft_s for turn in turns]
    prompt_tokens = sum(len(turn.prompt) for turn in turns)
    result = {
        "name": name,
        "pool_tokens": pool,
        "requests": len(turns),
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(turns) / seconds, 3),
        "output_tokens_per_s": round(len(turns) * ANSWER_TOKENS / seconds, 2),
        "ttft_mean_s": round(statistics.mean(ttft_s), 3),
        "ttft_p95_s": round(p95(ttft_s), 3),
        "prompt_tokens": prompt_tokens,
        "cached_share": round(sum(turn.answer.cached_tokens for turn in turns) / prompt_tokens, 3),
        "ttft_samples_s": [round(seconds, 4) for seconds in ttft_s],
        "load_1min_before": round(load_1min, 2),
        "lmc": lmc,
    }
    return result, answered


def warm_up(server: SglangServer) -> None:
    """With an unrelated prompt, a hit of it and its decoding."""
    prompt = [1000 + i % 97 for i in range(700)]
    server.generate(prompt, 4)
    server.generate(prompt, 4)
    server.flush()


def p95(samples: Sequence[float]) -> float:
    return sorted(samples)[max(0, -(-len(samples) * 95 // 100) - 1)]


def differences(ours: list[list[Turn]], theirs: list[list[Turn]]) -> dict[str, int]:
    pairs = list(zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True))
    same = sum(a.prompt == b.prompt for a, b in pairs)
    flipped = sum(
        a.prompt == b.prompt and a.answer.output_ids != b.answer.output_ids for a, b in pairs
    )
    return {"requests": len(pairs), "flipped": flipped, "followed": len(pairs) - same}


def table(report: dict[str, Any]) -> str:
    load, rows = report["load"], report["servers"]
    lines = [
        f"{load['chats']} chats of {load['turns']} turns about {load['documents']} documents, "
        f"{MODEL}, {report['machine']['cores']} cores",
        "",
        f"{'server':<12}{'pool':>8}{'requests/s':>12}{'tokens/s':>10}{'TTFT mean':>11}{'p95':>9}"
        f"{'from cache':>12}",
    ]
    lines += [
        f"{row['name']:<12}{row['pool_tokens']:>8}{row['requests_per_s']:>12.2f}"
        f"{row['output_tokens_per_s']:>10.1f}{row['ttft_mean_s']:>9.2f} s"
        f"{row['ttft_p95_s']:>7.2f} s{row['cached_share']:>12.0%}"
        for row in rows
    ]
    lines += [""]
    lines += [
        f"tokens, {pair}: {found['flipped']} of {found['requests']} answers differ, "
        f"{found['followed']} came later in such a chat"
        for pair, found in report["differences"].items()
    ]
    return "\n".join(lines)


def plot(report: dict[str, Any]) -> str:
    """Three small bar charts side by side, as SVG."""
    width, height, top = 220, 150, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * width}" height="{height + 80}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{3 * width}" height="{height + 80}" fill="white"/>',
    ]
    charts = (
        ("requests_per_s", "requests/s"),
        ("ttft_mean_s", "TTFT mean, s"),
        ("ttft_p95_s", "TTFT p95, s"),
    )
    for number, (field, title) in enumerate(charts):
        left = number * width
        most = max(row[field] for row in report["servers"]) or 1
        parts.append(f'<text x="{left + 20}" y="22" font-weight="bold">{title}</text>')
        for place, row in enumerate(report["servers"]):
            x, tall = left + 20 + place * 64, height * row[field] / most
            y = top + height - tall
            parts += [
                f'<rect x="{x}" y="{y:.1f}" width="48" height="{tall:.1f}" '
                f'fill="{COLORS[row["name"]]}"/>',
                f'<text x="{x + 24}" y="{y - 4:.1f}" text-anchor="middle">{row[field]:.2f}</text>',
                f'<text x="{x + 24}" y="{top + height + 16}" text-anchor="middle" '
                f'font-size="11">{row["name"]}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for report, plot and logs")
    parser.add_argument("--quick", action="store_true", help="four chats of two turns")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    # four chats fit where four of another document do not
    load = Load(chats=4, turns=2, documents=4, pool=2560) if options.quick else Load()
    chats = Chats(model(MODEL), load)
    measured = {name: measure(name, chats, out) for name in COLORS}
    report = {
        "model": MODEL,
        "load": {name: getattr(load, name) for name in Load.__slots__},
        "system_tokens": SYSTEM_TOKENS,
        "document_tokens": DOCUMENT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "servers": [result for result, _ in measured.values()],
        "differences": {
            f"{name} against large": differences(measured[name][1], measured["large"][1])
            for name in ("small", "small+lmc")
        },
        "machine": machine(),
        "versions": versions(),
    }
    (out / "load.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "load.svg").write_text(plot(report))
    print("\n" + table(report))
    print(f"\nall figures: {out / 'load.json'}, plot: {out / 'load.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
