#!/usr/bin/env bash
# All checks and all tests, from a clean clone, with nothing to answer. Stops at the first stage that fails.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

bash ci/check.sh

use_env dev
say "tests without an engine"
"$PY" -m pytest

use_env sglang
say "models for the engine tests"
"$PY" tests/engines/models.py tiny-llama tiny-mla tiny-mellum
# A server may take two minutes to start on a busy machine; only then is a silent test a hang.
say "tests inside SGLang, and against real SGLang servers"
"$PY" -m pytest -m "not slow and not gpu" -o faulthandler_timeout=600 \
    tests/integrations tests/engines tests/cli tests/test_readme.py tests/ci/test_matrix.py \
    tests/kernels/test_triton.py

use_env vllm
say "models for the engine tests"
"$PY" tests/engines/models.py tiny-llama tiny-mla tiny-gemma3 tiny-lfm2 smollm2-135m
say "tests inside vLLM, and against real vLLM servers"
"$PY" -m pytest -m "not slow and not gpu" -o faulthandler_timeout=600 \
    tests/integrations tests/engines tests/cli tests/test_readme.py
