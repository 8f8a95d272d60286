"""lmc keeps the KV cache of prompts a language model has already read, and gives it back when they
come again.

These names are all it takes to use the store without an engine. Each is imported when it is first
asked for: an engine that loads lmc's entry point and leaves lmc off pays for nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config
    from .keys import Key, KeyChain, Name, Namespace
    from .layout import KVLayout
    from .store import Ticket, TieredStore
    from .tiers import open_tiers
    from .tiers.ram import Chunk, ReadLease, WriteLease
    from .tiers.tier import Tier

__all__ = [
    "Chunk",
    "Config",
    "KVLayout",
    "Key",
    "KeyChain",
    "Name",
    "Namespace",
    "ReadLease",
    "Ticket",
    "Tier",
    "TieredStore",
    "WriteLease",
    "__version__",
    "open_tiers",
]

__version__ = "0.1.0"

_HOME = {
    "Chunk": "tiers.ram",
    "Config": "config",
    "KVLayout": "layout",
    "Key": "keys",
    "KeyChain": "keys",
    "Name": "keys",
    "Namespace": "keys",
    "ReadLease": "tiers.ram",
    "Ticket": "store",
    "Tier": "tiers.tier",
    "TieredStore": "store",
    "WriteLease": "tiers.ram",
    "open_tiers": "tiers",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lmc' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
