"""lmc at work: a real server, a real model, a document of 2,000 tokens. Started by `bash
ci/demo.sh`; what differs between the engines is in demo_engines.py.

Three servers run one after the other: with lmc, with lmc again on the same folder, and without
lmc. Each variant of the prompt (same length, different first line) is asked in turn:

    server 1  cold, then twice: flush, after_flush        lmc answers from RAM
    server 2  after_restart                               lmc answers from disk
    server 3  off, then twice: engine_hit                 lmc not switched on

Timings are reported, never judged. What is judged: the same tokens in every run, and how many
came from the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ci.demo_engines import ENGINES  # noqa: E402
from lmc.cli.machine import machine, versions  # noqa: E402
from tests.engines.models import ModelError, model  # noqa: E402
from tests.engines.server import Answer, Server, ServerError, check_port  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ci.demo_engines import Engine

MODEL = "smollm2-135m"
DOCUMENT = ROOT / "ci" / "data" / "reading.txt"
QUESTION = "What is the store called in which the keys and values are kept?"
TURNS = (
    "In one sentence: what is this text about?",
    "What are the desk, the bookshelf and the cellar?",
    "Why is a wrong answer worse than a slow one?",
)
NUM_TOKENS, NUM_CHAT_TOKENS = 8, 40
HIT_ROUNDS = 2
DISK_GB, FREE_GB = 4, 5
HITS = ("engine_hit", "after_flush", "after_restart")
NAMES = ("cold", "off", *HITS)
WHAT = {
    "cold": "first time, lmc on",
    "off": "first time, without lmc",
    "engine_hit": "again, without lmc: {}'s own cache",
    "after_flush": "again, {}'s cache emptied: lmc, RAM",
    "after_restart": "again, server restarted: lmc, disk",
}


class DemoError(Exception):
    """The demo cannot run, or did not show what it promises."""


@dataclass
class Results:
    """All answers by run name; in each list, answers to variant 0 first."""

    answers: dict[str, list[list[Answer]]] = field(default_factory=dict)

    def add(self, name: str, variant: int, answer: Answer) -> None:
        of_name = self.answers.setdefault(name, [])
        if variant == len(of_name):
            of_name.append([])
        of_name[variant].append(answer)

    def all(self, name: str) -> list[Answer]:
        return [answer for of_variant in self.answers[name] for answer in of_variant]

    def ttft_s(self, name: str) -> float:
        return statistics.median(answer.ttft_s for answer in self.all(name))

    def cached_tokens(self, name: str) -> int:
        """The worst: the fewest of a hit, the most of a run that must be cold."""
        worst = min if name in HITS else max
        return worst(answer.cached_tokens for answer in self.all(name))

    def first(self, name: str) -> Answer:
        return self.answers[name][0][0]

    def identical(self) -> bool:
        num_variants = len(self.answers[NAMES[0]])
        by_variant = (
            {answer.output_ids for name in NAMES for answer in self.answers[name][variant]}
            for variant in range(num_variants)
        )
        return all(len(outputs) == 1 for outputs in by_variant)


class Demo:
    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.port: int | None = options.port
        self.engine = ENGINES[options.engine](options.page_size)
        self.cache = self.out / "lmc-demo-cache"
        self.started_s = time.monotonic()
        self.model = model(MODEL)
        self.prompts = prompts(self.model, options.repeats, self.engine.prompt_tokens)
        self.warm_up_prompt = self.prompts[0][::-1][:700]
        self.results = Results()
        self.chat: list[dict[str, Any]] = []
        self.load: dict[str, float] = {}
        self.version = ""
        self.counters: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        with self.server("with lmc", lmc=True) as server:
            self.version = self.engine.read_settings(server)
            self.ask_first(server)
            self.hold_chat(server)
            self.engine.drain(server)
            self.counters["first"] = self.engine.counters(server)
        with self.server("again, on the same folder", lmc=True) as server:
            self.ask_again(server)
            self.counters["restarted"] = self.engine.counters(server)
            server.kill()  # at once: nothing in it is needed any more
        with self.server("without lmc", lmc=False) as server:
            self.ask_without(server)
            server.kill()

    @contextlib.contextmanager
    def server(self, what: str, *, lmc: bool) -> Iterator[Server]:
        self.say(f"starting {self.engine.title} {what}")
        name = what.split(",")[0].replace(" ", "-")
        settings = {"LMC_TIERS": f"file://{quote(str(self.cache))}?gb={DISK_GB}"}
        with self.engine.start(
            self.model,
            self.out / f"server-{name}.log",
            lmc=settings if lmc else None,
            port=self.port,
        ) as server:
            self.say("ready; warming up with an unrelated text")
            for _ in range(2):
                server.generate(self.warm_up_prompt, 2)
                server.generate(self.warm_up_prompt, 2)
                server.flush()
            self.load[what] = os.getloadavg()[0]
            yield server

    def ask_first(self, server: Server) -> None:
        for variant, prompt in enumerate(self.prompts):
            self.ask(server, "cold", variant, prompt)
            for _ in range(HIT_ROUNDS):
                server.flush()
                self.ask(server, "after_flush", variant, prompt)
            server.flush()

    def ask_again(self, server: Server) -> None:
        for variant, prompt in enumerate(self.prompts):
            self.ask(server, "after_restart", variant, prompt)
            server.flush()

    def ask_without(self, server: Server) -> None:
        for variant, prompt in enumerate(self.prompts):
            self.ask(server, "off", variant, prompt)
            for _ in range(HIT_ROUNDS):
                self.ask(server, "engine_hit", variant, prompt)
            server.flush()

    def ask(self, server: Server, name: str, variant: int, prompt: list[int]) -> None:
        answer = server.generate(prompt, NUM_TOKENS)
        self.results.add(name, variant, answer)
        self.say(
            f"text {variant + 1}  {name:<14} first token after {answer.ttft_s:6.3f} s, "
            f"{answer.cached_tokens} of {answer.prompt_tokens} tokens from the cache"
        )

    def hold_chat(self, server: Server) -> None:
        """The engine's cache is emptied before each turn: what a turn reuses comes from lmc."""
        title = self.engine.title
        self.say(f"a chat about the first text, {title}'s cache emptied before each turn")
        messages = [{"role": "system", "content": system_text(0)}]
        for question in TURNS:
            first = f"{DOCUMENT.read_text()}\n\n" if len(messages) == 1 else ""
            messages.append({"role": "user", "content": first + question})
            server.flush()
            reply = server.chat(messages, NUM_CHAT_TOKENS)
            text = reply["choices"][0]["message"]["content"].strip()
            messages.append({"role": "assistant", "content": text})
            usage = reply["usage"]
            cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
            self.chat.append(
                {
                    "question": question,
                    "answer": text,
                    "prompt_tokens": usage["prompt_tokens"],
                    "cached_tokens": cached,
                }
            )
            print(f"    you:   {question}\n    model: {' '.join(text.split())}", flush=True)
            print(
                f"           ({cached} of {usage['prompt_tokens']} tokens from the cache)",
                flush=True,
            )

    def report(self) -> dict[str, Any]:
        seconds = {name: self.results.ttft_s(name) for name in NAMES}
        return {
            "engine": self.engine.name,
            "model": MODEL,
            "prompt_tokens": len(self.prompts[0]),
            "page_size": self.engine.page_size,
            "runs": [
                {
                    "name": name,
                    "ttft_s": round(seconds[name], 4),
                    "cached_tokens": self.results.cached_tokens(name),
                    "output_ids": list(self.results.first(name).output_ids),
                    "samples_s": [round(answer.ttft_s, 4) for answer in self.results.all(name)],
                }
                for name in NAMES
            ],
            "identical_tokens": self.results.identical(),
            "question": QUESTION,
            "answer": self.results.first("cold").text,
            "chat": self.chat,
            "ratios": {
                "cold/after_flush": round(seconds["cold"] / seconds["after_flush"], 2),
                "cold/after_restart": round(seconds["cold"] / seconds["after_restart"], 2),
                "after_flush/engine_hit": round(seconds["after_flush"] / seconds["engine_hit"], 3),
                "after_restart/engine_hit": round(
                    seconds["after_restart"] / seconds["engine_hit"], 3
                ),
                "cold/off": round(seconds["cold"] / seconds["off"], 3),
            },
            "repeats": len(self.prompts),
            "wall_s": round(time.monotonic() - self.started_s, 1),
            "versions": versions() | {self.engine.name: self.version},
            "machine": machine(),
            "lmc": self.counters,
            "load_1min": {what: round(load, 2) for what, load in self.load.items()},
        }

    def check(self) -> None:
        if not self.results.identical():
            raise DemoError("the tokens differ between runs, see output_ids in demo-report.json")
        step = self.smallest_hit()
        least = len(self.prompts[0]) - 2 * step
        for name in NAMES:
            cached = self.results.cached_tokens(name)
            if name in HITS and cached < least:
                raise DemoError(
                    f"{name}: {cached} tokens came from the cache, at least {least} should"
                )
            if name not in HITS and cached:
                raise DemoError(f"{name}: {cached} tokens came from a cache, none should")
        for before, turn in itertools.pairwise(self.chat):
            least = before["prompt_tokens"] // step * step
            if turn["cached_tokens"] < least:
                raise DemoError(
                    f"chat: {turn['cached_tokens']} tokens came from the cache, all {least} of "
                    f"the turn before should"
                )

    def smallest_hit(self) -> int:
        """In tokens: lmc gives back whole pages, and at least 16 tokens at a time."""
        assert self.engine.page_size is not None
        return max(self.engine.page_size, 16)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:5.0f} s] {text}", flush=True)


def prompts(folder: Path, num_variants: int, length: int | None) -> list[list[int]]:
    """Equally long prompts that differ near their start, in the chat format of the model. With a
    `length` the text ends early, not the question.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    end = f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    encoded = [
        encode(
            f"<|im_start|>system\n{system_text(variant)}<|im_end|>\n"
            f"<|im_start|>user\n{DOCUMENT.read_text()}{end}"
        )
        for variant in range(num_variants)
    ]
    if length is not None:
        num_last = len(encode(end))
        encoded = [ids[: length - num_last] + ids[-num_last:] for ids in encoded]
    if len({len(prompt) for prompt in encoded}) != 1:
        raise DemoError("the variants of the prompt are not equally long")
    return encoded


def system_text(variant: int) -> str:
    return (
        f"Reader {variant + 1:02d} asks about a text. Answer from the text, in one short sentence."
    )


def print_table(report: dict[str, Any], engine: Engine) -> None:
    cold_s = report["runs"][0]["ttft_s"]
    print(f"\n{report['model']} on {report['machine']['cores']} cores, ", end="")
    print(f"{report['prompt_tokens']} tokens, pages of {report['page_size']}, ", end="")
    print(f"median of {report['repeats']} texts\n")
    print(f"{'run':<15}{'what':<41}{'first token':>12}{'against cold':>14}{'from cache':>12}")
    for run in report["runs"]:
        factor = f"{cold_s / run['ttft_s']:.1f}x"
        what = WHAT[run["name"]].format(engine.title)
        print(f"{run['name']:<15}{what:<41}{run['ttft_s']:>10.3f} s", end="")
        print(f"{factor:>14}{run['cached_tokens']:>12}")
    same = "the same" if report["identical_tokens"] else "DIFFERENT"
    print(f"\nlmc on {engine.title}'s scheduler thread: {engine.own_time(report['lmc']['first'])}")
    print(f"answers: {same} tokens in all runs: {report['answer'].strip()!r}")


def prepare(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")
    free_gb = shutil.disk_usage(out).free / 2**30
    if free_gb < FREE_GB:
        raise DemoError(
            f"{out} has {free_gb:.1f} GB of free disk, the demo needs {FREE_GB}: "
            f"free some, or name another folder with --out"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/demo.sh", description="lmc at work, on a CPU", allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".demo", help="folder for the report and logs"
    )
    parser.add_argument("--engine", choices=ENGINES, default="sglang")
    parser.add_argument("--port", type=int, help="port of the server (default: a free one)")
    parser.add_argument("--repeats", type=int, choices=range(1, 10), default=3, metavar="1..9")
    parser.add_argument("--page-size", type=int, help="page (vLLM: block) size of the engine")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    return options


def show(options: argparse.Namespace) -> None:
    prepare(options.out)
    if options.port is not None:
        check_port(options.port)
    demo = Demo(options)
    shutil.rmtree(
        demo.cache, ignore_errors=True
    )  # a run that was killed may have left one: the first run must be cold
    try:
        demo.run()
    finally:
        shutil.rmtree(demo.cache, ignore_errors=True)
    report = demo.report()
    path = options.out / "demo-report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report, demo.engine)
    print(f"all figures: {path}")
    demo.check()


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        show(parse(arguments))
    except (DemoError, ModelError, ServerError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the server is stopped too", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
