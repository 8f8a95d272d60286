"""How a vendor's GPUs copy best between pages and chunks; lmc.cuda and lmc.hip each give theirs."""

from dataclasses import dataclass

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True)
class Policy:
    wave: int
    """Threads that load together: the widest crew that a page is worth."""
    grid: int
    """Blocks of a launch: enough bytes in flight for the link, no more of the GPU than that."""
    staged_from: int | None
    """Bytes of a transfer from which the GPU copies pages to memory of its own and moves them from
    there in one piece; None: kernels always reach into the host's memory.
    """
    staging_bytes: int = 64 << 20
    """Such memory, for each direction."""
