"""Tests inside the engines. Each lives in an environment of its own; where one is not installed its
tests are not collected: SGLang's lie here, vLLM's in the folder vllm.
"""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore: list[str] = []
collect_ignore_glob: list[str] = []
__all__: list[str] = []
MISSING = {
    engine: tests
    for engine, tests in {"sglang": "test_*.py", "vllm": "vllm"}.items()
    if find_spec(engine) is None
}

if "sglang" in MISSING:
    collect_ignore_glob = [MISSING["sglang"]]
else:
    from tests.integrations.fixtures import harness, model_folder, pytest_collection_modifyitems

    __all__ += ["harness", "model_folder", "pytest_collection_modifyitems"]
if "vllm" in MISSING:
    collect_ignore = [MISSING["vllm"]]


def pytest_report_header() -> list[str]:
    return [
        f"tests/integrations/{tests} left out: no {engine} here (bash ci/test.sh has it)"
        for engine, tests in MISSING.items()
    ]
