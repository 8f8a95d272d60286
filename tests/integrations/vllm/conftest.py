"""vLLM's engine core and lmc's connector without weights. Left out where vLLM is not installed."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("vllm") is not None:
    from tests.integrations.vllm.fixtures import (
        engine,
        model_folder,
        pytest_collection_modifyitems,
    )

    __all__ = ["engine", "model_folder", "pytest_collection_modifyitems"]
else:
    collect_ignore_glob = ["*.py"]

    def pytest_report_header() -> str:
        return "tests/integrations/vllm left out: no vllm here (bash ci/test.sh has it)"
