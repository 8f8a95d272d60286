"""vLLM without a server:

    LMC_TIERS='file:///tmp/lmc?gb=10' python examples/offline_vllm.py MODEL README.md

Run it twice: the second process finds the KV of the first one on disk.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one question about a document")
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("--dtype", default="auto", help="float32 where the machine is a CPU")
    options = parser.parse_args()
    llm = LLM(
        model=options.model,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 30,
        kv_offloading_backend="lmc",
        kv_offloading_size=2,  # GiB of RAM
    )
    prompt = f"{options.document.read_text()[:6000]}\n\nQuestion: What is this about?\nAnswer:"
    greedy = SamplingParams(temperature=0, max_tokens=16)
    for run in ("first", "after a reset of vLLM's own cache"):
        started = time.perf_counter()
        (answer,) = llm.generate([prompt], greedy, use_tqdm=False)
        seconds = time.perf_counter() - started
        cached = f"{answer.num_cached_tokens} of {len(answer.prompt_token_ids)} tokens from cache"
        print(f"{run}: {seconds:.2f} s, {cached}: {answer.outputs[0].text.strip()!r}", flush=True)
        time.sleep(1)  # the copies of a finished request end in the background
        llm.reset_prefix_cache()
