"""Whose chunks these are: the namespaces of an engine's groups, and the keys of requests with
adapters.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.keys import Key, Namespace
from lmc.weights import fingerprint
from lmc.weights import name_of as weights_name

from . import compat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmc.config import Config
    from lmc.layout import KVLayout

    from .groups import Group
    from .wire import Registered

log = logging.getLogger("lmc")

_FROM_THE_FOLDER = (
    "auto",
    "hf",
    "pt",
    "safetensors",
    "npcache",
    "fastsafetensors",
    "gguf",
    "bitsandbytes",
    "mistral",
    "runai_streamer",
    "instanttensor",
)
"""Load formats whose weights are the files of the model's folder; others may come from anywhere."""


def namespaces_of(
    vllm_config: Any,
    config: Config,
    groups: Sequence[Group],
    layouts: Sequence[KVLayout],
    workers: Sequence[Registered],
) -> list[Namespace]:
    """One namespace a group: everything that changes the bytes of its chunks, apart from tokens."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    load = vllm_config.load_config
    weights = weights_name(
        model.model_weights or model.model,
        config.model_version,
        model.revision,
        load.download_dir,
        in_folder=str(load.load_format) in _FROM_THE_FOLDER,
    )
    common = {
        "engine": "vllm",
        "hashing": compat.hashing(vllm_config),
        "weights": weights or "unknown",
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf_overrides": repr(model.hf_overrides),
        "hf_config": _digest_of(model.hf_config),
        "cache_dtype": str(cache.cache_dtype),
        "calculate_kv_scales": str(getattr(cache, "calculate_kv_scales", False)),
        "ranks": f"{parallel.pipeline_parallel_size}x{parallel.tensor_parallel_size}",
        "workers": repr([sorted(worker.fields.items()) for worker in workers]),
        "rope": _rope(model),
        "media": _media(model),
        "salt": config.salt,
    }
    namespaces = [
        Namespace.of(
            common
            | {
                "group": f"{group.id}/{len(groups)}",
                "kind": group.kind.value,
                "blocks": group.describes,
                "layers": ",".join(group.layer_names),
                "stages": repr([len(worker.page_bytes[i]) for worker in workers]),
                **layout.describe(),
            }
        )
        for i, (group, layout) in enumerate(zip(groups, layouts, strict=True))
    ]
    if not weights:
        log.warning(
            "lmc cannot tell the weights of %s apart from others: chunks stay in this process. "
            "LMC_MODEL_VERSION=<name of the weights> lets them outlive it",
            model.model,
        )
    elif _media_are_numbered(model, cache):
        log.warning(
            "lmc: vLLM does not look at images and the like without prefix caching and "
            "mm_processor_cache_gb: chunks stay in this process"
        )
    else:
        return namespaces
    return [namespace.next_generation() for namespace in namespaces]


def _rope(model: Any) -> str:
    """Beyond the model's own configuration: LongRoPE picks its factors by max_model_len."""
    text = model.hf_text_config
    rope = repr((getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)))
    return f"{rope};{model.max_model_len}" if "longrope" in rope else ""


def _media(model: Any) -> str:
    """How media become tokens and embeddings, apart from what a request says: vLLM's hashes of
    media leave that out.
    """
    names = (
        "mm_processor_kwargs",
        "media_io_kwargs",
        "video_pruning_rate",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_device_do_normalize",
    )
    media = model.multimodal_config
    return repr([getattr(media, name, None) for name in names]) if media is not None else ""


def _media_are_numbered(model: Any, cache: Any) -> bool:
    """Whether vLLM calls media by their number in this process, not by their content."""
    media = model.multimodal_config
    return media is not None and not media.mm_processor_cache_gb and not cache.enable_prefix_caching


def _digest_of(hf_config: Any) -> str:
    """The configuration in force, wherever vLLM took it from; not where it lay."""
    fields = hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Adapters:
    """What tells the KV of one LoRA adapter from that of another. vLLM's block hashes know an
    adapter's name and path, not its weights.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[int, str], tuple[bytes, bool]] = {}

    def mark(self, lora: Any) -> tuple[bytes, bool]:
        """Bytes to fold into an adapter's keys, and whether other processes know them too."""
        if lora.load_inplace:  # other weights under the same name and path, from now on
            self._marks = {k: mark for k, mark in self._marks.items() if k[0] != lora.lora_int_id}
            return os.urandom(32), False
        known = (lora.lora_int_id, lora.lora_path)
        if known not in self._marks:
            try:
                digest = fingerprint(Path(lora.lora_path)) + _config_of(Path(lora.lora_path))
                self._marks[known] = hashlib.sha256(digest.encode()).digest(), True
            except OSError as error:
                log.warning(
                    "lmc cannot tell adapter %s apart from others, its chunks stay in this "
                    "process: %s",
                    lora.lora_name,
                    error,
                )
                self._marks[known] = os.urandom(32), False
        return self._marks[known]

    def forget(self) -> None:
        self._marks.clear()


def _config_of(folder: Path) -> str:
    """An adapter's rank, scale and targets change what its weights do."""
    path = folder / "adapter_config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def folded(mark: bytes, key: bytes) -> Key:
    return Key(hashlib.sha256(mark + key).digest())
