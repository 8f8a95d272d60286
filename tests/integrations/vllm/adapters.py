"""Adapters of the model without weights: vLLM's own worker reads, keeps and evicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}


def write(folder: Path, weights: bytes, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    (folder / "adapter_model.safetensors").write_bytes(weights)


def adapter(folder: Path, weights: bytes, number: int = 1, **more: Any) -> LoRARequest:
    """A request for the adapter in `folder`, which holds these weights now."""
    write(folder, weights)
    return LoRARequest(f"adapter {folder.name}", number, str(folder), **more)


class Contents:
    """Stands for vLLM's LoRAModel: all that is in a folder."""

    reading: Callable[[Path], None] | None = None
    """Called in the middle of reading."""
    modules_to_save = None

    def __init__(self, number: int, files: list[tuple[str, bytes]]) -> None:
        self.id, self.files = number, files

    @classmethod
    def from_local_checkpoint(
        cls, folder: str, _: Any, *, lora_model_id: int, **__: Any
    ) -> Contents:
        files = [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
        if cls.reading is not None:
            cls.reading(Path(folder))
        return cls(lora_model_id, files)


class _Slots(LRUCacheLoRAModelManager):
    """Adapters in memory, without a model that they change."""

    supported_lora_modules = ("q_proj",)
    packed_modules_mapping: ClassVar = {}
    modules: ClassVar = {}
    model = moe_ep_load_spec = _pooling_task = None
    _enable_mixed_moe_lora_format = False

    def __init__(self, lora_config: Any) -> None:
        self.lora_config = lora_config
        self._registered_adapters = AdapterLRUCache(self.capacity, lambda _: None)

    def _add_adapter(self, lora: Contents) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return self._registered_adapters.pop(adapter_id, None) is not None

    def pin_adapter(self, lora_id: int) -> bool:
        return True

    def remove_all_adapters(self) -> None:
        self._registered_adapters.clear()


class Loras(LRUCacheWorkerLoRAManager):
    """What a worker of vLLM's has loaded, by vLLM's own rules."""

    def __init__(self, vllm_config: Any) -> None:
        self._lora_model_cls = Contents
        self.lora_config = vllm_config.lora_config
        self.max_position_embeddings, self.vocab_size = 4096, 1024
        self._adapter_manager = _Slots(vllm_config.lora_config)

    def files(self, number: int) -> list[tuple[str, bytes]]:
        return self._adapter_manager.list_adapters()[number].files
