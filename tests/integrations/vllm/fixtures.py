"""Fixtures of the engine without weights."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

with warnings.catch_warnings():  # what torch and vLLM warn of at import is theirs
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from tests.integrations.vllm.fake import full
    from tests.integrations.vllm.harness import Engine, Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTINGS = {"LMC_RAM_GB": "0.1", "LMC_STAGE_WAIT_MS": "5000", "LMC_CHUNK_TOKENS": "64"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The engine's warnings are its own; a lease of ours that is never given back is an error here
    too.
    """
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for kind in (
                "ignore",
                "error::ResourceWarning",
                "error::pytest.PytestUnraisableExceptionWarning",
            ):
                item.add_marker(pytest.mark.filterwarnings(kind))


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}


def make_model(folder: Path, weights: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model: the harness computes KV itself."""
    return make_model(tmp_path_factory.mktemp("model"), b"weights of one model")


@pytest.fixture
def engine(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Builds engines: `engine(full(4), tp=2, LMC_RAM_GB="0.05", ...)`; settles, checks and closes
    them at the end. A `cold` one brings nothing up from disk unasked.
    """
    opened: list[Any] = []

    def build(
        specs: dict[str, Any] | None = None,
        *,
        shares: dict[str, str] | None = None,
        cold: bool = False,
        **options: Any,
    ) -> Any:
        for name in [name for name in os.environ if name.startswith("LMC_")]:
            monkeypatch.delenv(name)
        settings = {n: options.pop(n) for n in list(options) if n.startswith("LMC_")}
        for name, value in (SETTINGS | settings).items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            if cold:
                patch.setattr("lmc.store.TieredStore.warm", lambda _: None)
            chosen = Options(**{"model": model_folder, **options})
            opened.append(Engine(chosen, full(4) if specs is None else specs, shares))
        return opened[-1]

    yield build
    for one in opened:
        one.close()
