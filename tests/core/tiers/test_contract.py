"""Every tier of lmc passes the contract, also behind a wrapper that does nothing to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmc.testing import FaultyTier, MemoryTier, TierContract
from lmc.tiers.disk import DiskTier

if TYPE_CHECKING:
    from pathlib import Path

    from lmc.tiers.tier import Tier


class TestDisk(TierContract):
    def open(self, folder: Path) -> Tier:
        return DiskTier(folder / "tier", 1 << 30)


class TestMemory(TierContract):
    def open(self, folder: Path) -> Tier:
        return MemoryTier()


class TestFaultyWithoutFaults(TierContract):
    def open(self, folder: Path) -> Tier:
        return FaultyTier(DiskTier(folder / "tier", 1 << 30))
