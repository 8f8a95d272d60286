"""Entry points of engines. An engine calls these in every process it starts; unless LMC_ENABLE asks
for lmc, nothing else of it is imported.
"""

from __future__ import annotations

import importlib

from .config import Config


def sglang() -> None:
    """Group `sglang.srt.plugins`."""
    if Config.from_env().enable:
        importlib.import_module("lmc_sglang")
