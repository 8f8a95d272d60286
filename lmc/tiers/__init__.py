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
    places = [(url.scheme, url.host, url.path) for url in config.tiers]
    for scheme, host, path in places:
        if places.count((scheme, host, path)) > 1:
            raise ValueError(f"LMC_TIERS: names {scheme}://{host}{path} more than once")
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
    if options or not 0.001 <= capacity <= 1e6:
        raise ValueError(f"{text}: the only option is gb=SIZE, a number from 0.001 to 1e+06 GB")
    try:
        return DiskTier(Path(url.path), int(capacity * _GB))
    except OSError as error:
        raise ValueError(f"{text}: cannot be used: {error}") from error


_OPENERS = {"file": _open_disk}
