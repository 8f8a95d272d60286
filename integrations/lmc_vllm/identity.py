"""Whose chunks these are: the namespaces of an engine's groups."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from lmc.keys import Namespace
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
