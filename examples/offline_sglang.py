"""SGLang without a server:

    LMC_TIERS='file:///tmp/lmc?gb=10' python examples/offline_sglang.py MODEL README.md

Run it twice: the second process finds the KV of the first one on disk.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sglang

import lmc_sglang  # noqa: F401  (before an engine is made: it switches lmc on)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one question about a document")
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("--dtype", default="auto", help="float32 where the machine is a CPU")
    parser.add_argument("--device", default=None, help="cpu, cuda; SGLang's choice if not given")
    options = parser.parse_args()
    engine = sglang.Engine(
        model_path=options.model,
        dtype=options.dtype,
        device=options.device,
        max_total_tokens=8192,
        log_level="error",
    )
    prompt = f"{options.document.read_text()[:6000]}\n\nQuestion: What is this about?\nAnswer:"
    greedy = {"temperature": 0, "max_new_tokens": 16}
    for run in ("first", "after a flush of SGLang's own cache"):
        started = time.perf_counter()
        answer = engine.generate(prompt, greedy)
        seconds = time.perf_counter() - started
        meta = answer["meta_info"]
        cached = f"{meta['cached_tokens']} of {meta['prompt_tokens']} tokens from cache"
        print(f"{run}: {seconds:.2f} s, {cached}: {answer['text'].strip()!r}", flush=True)
        time.sleep(1)  # the copies of a finished request end in the background
        engine.flush_cache()
    engine.shutdown()
