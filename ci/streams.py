"""What running streams notice while other requests are stored and loaded, with lmc and without it.

    python ci/streams.py [--out FILE]          in the sglang environment; about six minutes on two
    cores

Two clients stream short answers all the time. Beside them one client asks about six documents,
twice over; the engine's pool holds four, so the second round is recomputed without lmc and loaded
with it. One table: time between two tokens of the streams, and time to the first token of the
documents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.engines.models import model  # noqa: E402
from tests.engines.sglang_server import SglangServer  # noqa: E402

DOCUMENTS, DOCUMENT_TOKENS, STREAMS, POOL_TOKENS = 6, 1024, 2, 5120


def prompt(seed: int, num_tokens: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(5, 49_000) for _ in range(num_tokens)]


def stream_forever(
    server: SglangServer, seed: int, gaps: list[float], stop: threading.Event
) -> None:
    while not stop.is_set():
        last = None
        for _ in server.stream(prompt(seed, 32), 64):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now
            if stop.is_set():
                return


def measure(server: SglangServer) -> dict[str, dict[str, float]]:
    rows = {}
    server.generate(prompt(7, 64), 4)
    for name in ("first round", "second round"):
        gaps: list[list[float]] = [[] for _ in range(STREAMS)]
        stop = threading.Event()
        clients = [
            threading.Thread(target=stream_forever, args=(server, 50 + n, gaps[n], stop))
            for n in range(STREAMS)
        ]
        for client in clients:
            client.start()
        time.sleep(3)
        answers = [server.generate(prompt(100 + n, DOCUMENT_TOKENS), 2) for n in range(DOCUMENTS)]
        stop.set()
        for client in clients:
            client.join()
        taken = sorted(gap for one in gaps for gap in one)
        rows[name] = {
            "gap_p50_ms": 1e3 * taken[len(taken) // 2],
            "gap_p95_ms": 1e3 * taken[int(len(taken) * 0.95)],
            "gap_max_ms": 1e3 * taken[-1],
            "ttft_s": statistics.median(answer.ttft_s for answer in answers),
            "cached_tokens": statistics.median(answer.cached_tokens for answer in answers),
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    flags = (
        "--max-total-tokens",
        str(POOL_TOKENS),
        "--max-running-requests",
        "8",
        "--page-size",
        "64",
    )
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        with_lmc = {"LMC_ENABLE": "1", "LMC_RAM_GB": "2", "LMC_TIERS": f"file://{folder}/tier?gb=5"}
        for name, environment in (("without lmc", {}), ("with lmc", with_lmc)):
            print(f"{name} ...", flush=True)
            log = Path(folder) / "server.log"
            with SglangServer(
                model("smollm2-135m"), log, flags=flags, environment=environment
            ) as server:
                report[name] = measure(server)
    shape = f"{STREAMS} streams, {DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens"
    print(f"load {os.getloadavg()[0]:.1f}; {shape}")
    print(f"{'':28}{'token gap p50':>14}{'p95':>9}{'max':>9}{'document TTFT':>15}{'cached':>8}")
    for name, rounds in report.items():
        for which, row in rounds.items():
            print(
                f"{name + ', ' + which:28}{row['gap_p50_ms']:11.0f} ms{row['gap_p95_ms']:6.0f} ms"
                f"{row['gap_max_ms']:6.0f} ms{row['ttft_s']:13.2f} s{row['cached_tokens']:8.0f}"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
