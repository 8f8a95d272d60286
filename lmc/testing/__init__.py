"""For those who write a tier: the contract every tier passes, as a pytest class, and tiers to test
against.

    from lmc.testing import TierContract

    class TestMyTier(TierContract):
        def open(self, folder):
            return MyTier(...)

`FaultyTier` wraps a tier and makes it fail on purpose, to show that the store turns it into a miss.
`MemoryTier` is the smallest tier there is. Needs pytest; nothing in lmc imports this package.
"""

from .contract import TierContract
from .faulty import Fault, FaultyTier
from .memory import MemoryTier

__all__ = ["Fault", "FaultyTier", "MemoryTier", "TierContract"]
