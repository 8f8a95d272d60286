"""A user's launch script: the import on its first line is all it does about lmc.

Run by test_sglang.py: `python launch_script.py MODEL PROMPT.json`; prints what it was answered.
"""

import lmc_sglang  # noqa: F401, I001  (first on purpose)
import json
import sys
from pathlib import Path

import sglang


def main() -> None:
    engine = sglang.Engine(
        model_path=sys.argv[1],
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        sampling_backend="pytorch",
        grammar_backend="none",
        max_total_tokens=8192,
        log_level="warning",
        enable_cache_report=True,
    )
    prompt = json.loads(Path(sys.argv[2]).read_text())
    answers = {"cold": ask(engine, prompt), "engine_hit": ask(engine, prompt)}
    engine.flush_cache()
    answers["after_flush"] = ask(engine, prompt)
    engine.shutdown()
    print("\n" + json.dumps(answers))


def ask(engine: sglang.Engine, prompt: list[int]) -> dict[str, object]:
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = engine.generate(input_ids=prompt, sampling_params=greedy)
    cached = answer["meta_info"]["cached_tokens"]
    return {"output_ids": answer["output_ids"], "cached_tokens": cached}


if __name__ == "__main__":
    main()
