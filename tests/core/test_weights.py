"""The name of a model's weights: what changes what it computes shows, all else does not."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from lmc.weights import fingerprint, model_folder, name_of

if TYPE_CHECKING:
    from pathlib import Path

TENSOR_BYTES = 40_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [0, TENSOR_BYTES]}}
    ).encode()
    blob = len(header).to_bytes(8, "little") + header + bytes(TENSOR_BYTES)
    (made / "model.safetensors").write_bytes(blob)
    (made / "config.json").write_text("{}")
    return made


def test_a_copy_has_the_same_name(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "params.json",
        "tekken.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "quantize_config.json",
        "adapter_config.json",
        "modeling_of_its_own.py",
    ],
)
def test_what_decides_how_media_and_tokens_become_kv_is_in_the_name(
    folder: Path, name: str
) -> None:
    names = {fingerprint(folder)}
    for text in ('{"size": 224}', '{"size": 336}'):
        (folder / name).write_text(text)
        names.add(fingerprint(folder))
    assert len(names) == 3


def test_the_same_text_in_another_file_is_another_model(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{}")
    first = fingerprint(folder)
    (folder / "processor_config.json").rename(folder / "preprocessor_config.json")
    assert fingerprint(folder) != first


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "generation_config.json"])
def test_what_only_tokens_hang_on_is_not(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    (folder / name).write_text("anything")
    assert fingerprint(folder) == before


def test_other_weights_have_another_name(folder: Path) -> None:
    before = fingerprint(folder)
    path = folder / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-TENSOR_BYTES // 2] ^= 1
    path.write_bytes(blob)
    assert fingerprint(folder) != before


def test_no_weights_have_no_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprint(tmp_path)
    assert name_of(str(tmp_path), "", None, None, in_folder=True) == ""
    assert name_of(str(tmp_path), "v1", None, None, in_folder=True) == f"named:v1:{tmp_path}"


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert model_folder(str(folder), None, None) == folder
