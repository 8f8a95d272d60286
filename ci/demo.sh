#!/usr/bin/env bash
# lmc at work inside a real SGLang server, on a CPU, with a real model: bash ci/demo.sh [--help]
# The first run installs everything into .venvs/ and .models/, later runs reuse it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env sglang
exec "$PY" "$ROOT/ci/demo.py" "$@"
