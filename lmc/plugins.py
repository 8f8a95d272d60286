"""Entry points of engines, which call them in every process they start."""

from __future__ import annotations

import importlib

from .config import Config


def sglang() -> None:
    """Group `sglang.srt.plugins`: unless LMC_ENABLE asks for lmc, nothing else is imported."""
    if Config.asks_for_lmc():
        importlib.import_module("lmc_sglang")


def vllm() -> None:
    """Group `vllm.general_plugins`: teaches vLLM's options the name, which is not yet using it."""
    importlib.import_module("lmc_vllm")
