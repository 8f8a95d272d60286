"""A digest of a model's weights that costs a few reads, so that two models never share a namespace.

Every tensor of a safetensors file is sampled at three places, every other file at regular ones;
sizes, tensor names, shapes, the configuration and what prepares media are taken whole. Training or
merging touches every element of the tensors it touches, so a changed tensor shows; a copy of the
same files on another machine does not. Paths and times do not count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger("lmc")

SAMPLE_BYTES = 256
_SAMPLES_OF_A_FILE = 256
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS = (
    "config.json",
    "params.json",
    "adapter_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "sparse_attention_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "tekken.json",
)
"""What else decides how tokens and media become KV, the formats of Mistral included. Tokenizers and
chat templates decide which tokens there are: those are in the keys.
"""
_CODE = ".py"
"""Models may bring code of their own."""
_MAX_HEADER_BYTES = 100 << 20

FolderState = dict[str, tuple[int, int, int, int]]
"""Files by name: inode, size, times of writing and of changing in nanoseconds."""


def name_of(
    model: str, version: str, revision: str | None, cache_dir: str | None, *, in_folder: bool
) -> str:
    """A name for a model's weights: the user's `version`, or a digest of the files; "" if neither
    is to be had (`in_folder`: whether the engine reads the weights from the model's folder).
    """
    if version:
        return f"named:{version}:{model}"
    if not in_folder:
        return ""
    try:
        return f"digest:{fingerprint(model_folder(model, revision, cache_dir))}"
    except OSError as error:
        log.info("no digest of the weights: %s", error)
        return ""


def model_folder(model: str, revision: str | None, cache_dir: str | None) -> Path:
    """Where the weights lie on this machine. Raises FileNotFoundError."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{model} is neither a folder nor in the local hub cache"
        ) from error


def fingerprint(folder: Path) -> str:
    """Hex digest of the weights in `folder`. Raises FileNotFoundError if there are none."""
    weights, configs = _files_that_count(folder)
    if not weights:
        raise FileNotFoundError(f"no weights ({', '.join(_WEIGHTS)}) in {folder}")
    digest = hashlib.sha256()
    for path in weights:
        digest.update(_digest_of_file(path))
    for path in configs:
        digest.update(hashlib.sha256(path.name.encode()).digest())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def state_of(folder: Path) -> FolderState:
    """What changes whenever a file that `fingerprint` reads is written, replaced or removed. Raises
    OSError.
    """
    weights, configs = _files_that_count(folder)
    stats = {path.name: path.stat() for path in weights + configs}
    return {n: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats.items()}


def _files_that_count(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files with weights, and files with what else is digested."""
    files = sorted(folder.iterdir())
    configs = [path for path in files if path.name in _CONFIGS or path.suffix == _CODE]
    return [path for path in files if path.suffix in _WEIGHTS], configs


def _digest_of_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = _safetensors_header(fd, size) if path.suffix == ".safetensors" else b""
        digest.update(header)
        for place in _places_in_tensors(header) or _places_in_file(size):
            digest.update(os.pread(fd, SAMPLE_BYTES, place))
    finally:
        os.close(fd)
    return digest.digest()


def _safetensors_header(fd: int, size: int) -> bytes:
    """Length and JSON of a safetensors file; empty if it is none, and then it is sampled like any
    other.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
        return b""
    return os.pread(fd, 8 + length, 0)


def _places_in_tensors(header: bytes) -> list[int]:
    """Three places of every tensor; none if this is no header of safetensors after all."""
    try:
        tensors = sorted(json.loads(header[8:]).items())
        spans = [tensor["data_offsets"] for name, tensor in tensors if name != "__metadata__"]
        return [
            len(header) + begin + max(0, (end - begin) * part // 4 - SAMPLE_BYTES // 2)
            for begin, end in spans
            for part in (1, 2, 3)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _places_in_file(size: int) -> range:
    return range(0, size, max(1, size // _SAMPLES_OF_A_FILE))
