"""Fixtures of the in-process harness. SGLang's modules read the published arguments: publish before
they load.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integrations.gpu import Gpu

with warnings.catch_warnings():  # what torch and SGLang warn of at import is theirs
    warnings.simplefilter("ignore")
    import msgspec
    import torch
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    SERVER_ARGS = ServerArgs(model_path="dummy", device="cpu", page_size=64)
    SERVER_ARGS.resolve_once()
    SERVER_ARGS._mamba_cache_chunk_size = 64  # else asked of the model's files
    publish(SERVER_ARGS, role="scheduler")
    torch.set_num_threads(1)
    from tests.integrations.harness import Harness
    from tests.integrations.models import ModelHarness


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model: the harness computes KV itself."""
    return make_model(tmp_path_factory.mktemp("model"), b"weights of one model")


def make_model(folder: Path, weights: bytes) -> Path:
    (folder / "model.bin").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def harness(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Builds harnesses: `harness(page=64, LMC_RAM_GB="0.05", model=folder, ...)`; closes them at
    the end. A `cold` one brings nothing up from disk unasked; one with a `gpu` copies by its
    driver; one with a `model_kind` has that model's pools.
    """
    opened: list[Any] = []

    def build(
        page: int = 64,
        size: int = 8192,
        model: Path = model_folder,
        *,
        cold: bool = False,
        layout: str = "nhd",
        gpu: Gpu | None = None,
        model_kind: str = "",
        **settings: str,
    ) -> Any:
        for name in ("LMC_TIERS", "LMC_SALT", "LMC_MODEL_VERSION", "LMC_CHUNK_TOKENS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LMC_RAM_GB", "0.2")
        monkeypatch.setenv("LMC_STAGE_WAIT_MS", "5000")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        args = msgspec.structs.replace(SERVER_ARGS, model_path=str(model))
        make: Any = partial(ModelHarness, model_kind) if model_kind else Harness
        if gpu is not None:
            monkeypatch.setattr("lmc_sglang.linker.resolve", lambda *_, **__: gpu.backend())
            monkeypatch.setattr("torch.cuda.current_stream", lambda *_: gpu.current_stream)
        with monkeypatch.context() as patch:
            if cold:
                patch.setattr("lmc.store.TieredStore.warm", lambda _: None)
            opened.append(make(args, page, size, layout, device=gpu))
        return opened[-1]

    yield build
    for one in opened:
        one.close()
