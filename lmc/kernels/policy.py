"""How a vendor's GPUs copy best between pages and chunks; lmc.cuda and lmc.hip each give theirs."""

from dataclasses import dataclass, replace
from typing import Self

from lmc.config import GPU_COPIES

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True)
class Policy:
    wave: int
    """Threads that load together: the widest crew that a page is worth."""
    grid: int
    """Blocks of a launch, of BLOCK threads or as many in smaller ones: enough bytes in flight for
    the link, no more of the GPU than that.
    """
    batch_from: int | None
    """Bytes of a piece, on the average of a transfer, from which copy engines are given all pieces
    in one call; None: never. A piece is what is contiguous in the pool and in the chunk.
    """
    staged_from: int | None
    """Bytes of a transfer from which the GPU copies pages to memory of its own and moves them from
    there in one piece; None: never. What is neither: kernels reach into the host's memory.
    """
    staging_bytes: int = 64 << 20
    """Such memory, for each direction."""

    def forced(self, way: str, grid: int | None = None) -> Self:
        """With one of GPU_COPIES for all pinned memory, `auto` the vendor's own choice, and that
        many blocks. Raises ValueError for a way that this vendor's GPUs are not trusted with.
        """
        if way not in GPU_COPIES:
            known = ", ".join(GPU_COPIES)
            raise ValueError(f"unknown way to copy {way!r}, choose from {known}")
        if way == "batch" and self.batch_from is None:
            raise ValueError(
                "way to copy 'batch': lmc does not build on this vendor's, choose reach or stage"
            )
        policy = replace(self, grid=grid or self.grid)
        if way == "auto":
            return policy
        batch_from, staged_from = (0 if way == name else None for name in ("batch", "stage"))
        return replace(policy, batch_from=batch_from, staged_from=staged_from)
