"""Places for chunks: RAM here, everything slower behind the `Tier` protocol and its guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .disk import DiskTier

if TYPE_CHECKING:
    from ..config import Config, TierUrl
    from .tier import Tier

_GB = 10**9


def open_tiers(config: Config) -> list[Tier]:
    """The tiers of LMC_TIERS, in order. Raises ValueError that names the entry and what is wrong
    with it.
    """
    return [_OPENERS[url.scheme](url) for url in config.tiers]


def _open_disk(url: TierUrl) -> Tier:
    options = dict(url.options)
    try:
        capacity = float(options.pop("gb", "20"))
    except ValueError:
        capacity = -1.0
    text = f"LMC_TIERS: file://{url.path}"
    if url.host or not url.path.startswith("/"):
        raise ValueError(
            f"LMC_TIERS: file://{url.host}{url.path}: needs an absolute path, file:///folder"
        )
    if options or not 0 < capacity < 1e6:
        raise ValueError(f"{text}: the only option is gb=SIZE, a number above 0")
    try:
        return DiskTier(Path(url.path), int(capacity * _GB))
    except OSError as error:
        raise ValueError(f"{text}: cannot be used: {error}") from error


_OPENERS = {"file": _open_disk}
