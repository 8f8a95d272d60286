"""Tests inside SGLang. It lives in an environment of its own; where it is not installed nothing
here is collected.
"""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob: list[str] = []

if find_spec("sglang") is not None:
    from tests.integrations.fixtures import harness, model_folder, pytest_collection_modifyitems

    __all__ = ["harness", "model_folder", "pytest_collection_modifyitems"]
else:
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header() -> str:
        return "tests/integrations left out: no sglang here (bash ci/test.sh has it)"
