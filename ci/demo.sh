#!/usr/bin/env bash
# lmc at work inside a real SGLang or vLLM server, on a CPU, with a real model: bash ci/demo.sh [--engine vllm] [--help]
# The first run installs everything into .venvs/ and .models/, later runs reuse it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
engine=sglang
[[ " $* " =~ " --engine"[=\ ]vllm" " ]] && engine=vllm
use_env "$engine"
exec "$PY" "$ROOT/ci/demo.py" "$@"
