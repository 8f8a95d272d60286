#!/usr/bin/env bash
# Formatting, lint, types and the order of imports.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
use_env dev
cd "$ROOT"
say "ruff format --check" && "$PY" -m ruff format --check .
say "ruff check" && "$PY" -m ruff check .
say "mypy" && "$PY" -m mypy
say "ci/layers.py" && "$PY" ci/layers.py
