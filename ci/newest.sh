#!/usr/bin/env bash
# The contract with SGLang against its newest release: what lmc rests on is compared, then its tests inside SGLang's cache
# run. Over the environment of the release that is pinned, so what that release wants besides is not there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"

use_env sglang
site=$ROOT/.venvs/newest
rm -rf "$site"
say "newest SGLang"
install sglang --no-deps --target "$site" --upgrade sglang
export PYTHONPATH=$site
"$PY" -c 'import importlib.metadata as m; print("sglang", m.version("sglang"))'
"$PY" -m pytest -m "not slow and not gpu" tests/integrations/test_compat.py \
    tests/integrations/test_linker.py tests/integrations/test_models.py tests/integrations/test_hicache.py
