"""What switching lmc on declares, and that it declares nothing where it must not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.engines.models import model
from tests.engines.server import server_environment

CASES = {
    "plain": {},
    "page of the user": {"page_size": 16},
    "prefill in odd pieces": {"chunked_prefill_size": 100},
    "no radix cache": {"disable_radix_cache": True},
    "hicache": {"enable_hierarchical_cache": True},
    "own cache": {"radix_cache_backend": "mine"},
    "stages": {"pp_size": 2},
    "context in parts": {"tp_size": 2, "attn_cp_size": 2},
    "decoded context in parts": {"tp_size": 2, "dcp_size": 2},
    "own linker": {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {"linker": "Mine", "linker_module_path": "mine"},
    },
}

SCRIPT = """
import json, sys
{first}
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
found = {{}}
for name, fields in json.load(sys.stdin).items():
    args = ServerArgs(model_path=sys.argv[1], device="cpu", sampling_backend="pytorch",
                      grammar_backend="none", skip_tokenizer_init=True, **fields)
    args.resolve_once()
    view = resolving_view(args)
    config = view.unified_cache_external_linker_config or {{}}
    found[name] = [view.page_size, config.get("linker")]
print("FOUND", json.dumps(found), "lmc" in sys.modules and "lmc_sglang" in sys.modules)
"""


def resolve(first: str = "", **environment: str) -> tuple[dict[str, list[object]], bool]:
    """Page size and linker that SGLang's arguments resolve to, and whether lmc was imported."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first), str(model("tiny-llama"))],
        input=json.dumps(CASES),
        env=server_environment(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("FOUND")), None)
    assert line is not None, run.stdout[-2000:] + run.stderr[-4000:]
    found, imported = line.removeprefix("FOUND ").rsplit(" ", 1)
    return json.loads(found), imported == "True"


@pytest.fixture(scope="module")
def without_lmc() -> tuple[dict[str, list[object]], bool]:
    return resolve()


@pytest.mark.parametrize(
    ("first", "environment"),
    [("import lmc_sglang", {}), ("", {"LMC_ENABLE": "1"})],
    ids=["import", "environment"],
)
def test_switched_on(first, environment, without_lmc):
    found, _ = resolve(first, **environment)
    off = without_lmc[0]
    assert found == {
        "plain": [64, "LmcLinker"],
        "page of the user": [16, "LmcLinker"],
        "prefill in odd pieces": [1, "LmcLinker"],
        "no radix cache": off["no radix cache"],
        "hicache": off["hicache"],
        "own cache": off["own cache"],
        "stages": [1, None],
        "context in parts": [1, None],
        "decoded context in parts": [1, None],
        "own linker": [64, "Mine"],
    }


def test_installed_and_not_enabled_nothing_changes(without_lmc):
    found, imported = without_lmc
    assert not imported
    assert found["plain"] == [1, None]
    assert found["own linker"] == [1, "Mine"]


def test_zero_in_the_environment_wins_over_the_import(without_lmc):
    assert resolve("import lmc_sglang", LMC_ENABLE="0")[0] == without_lmc[0]
