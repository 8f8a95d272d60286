"""The shape of a chunk, without torch: planes, pages, steps and how many bytes each takes.

    chunk   | step 0      | step 1      | ... | step chunk_steps-1 |  chunk_tokens tokens
    step    | page | page | ... |                                     max(page_tokens, 16) tokens
    payload [plane][page][bytes]; a tail of n pages is [plane][n][bytes]

Planes are in layer order, so a range of layers is one run of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGN = 4096
MIN_STEP_TOKENS = 16
MIN_CHUNK_TOKENS = 64
MAX_CHUNK_STEPS = 96
"""The frame block lists a chunk's step keys: 96 of 32 bytes fit beside the header."""


def aligned(num_bytes: int) -> int:
    """Round up to the alignment of direct disk I/O."""
    return -(-num_bytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of the chunks of one rank.

    `plane_bytes[i]` is the size of one page in plane i; a plane is one (layer, K or V) array of the
    engine's pool. A prefix ends at a step: `step_tokens` where not at every page, then of at least
    16 tokens.
    """

    page_tokens: int
    chunk_tokens: int
    plane_bytes: tuple[int, ...]
    step_tokens: int = 0
    min_chunk_tokens: int = MIN_CHUNK_TOKENS
    page_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        page, chunk = self.page_tokens, self.chunk_tokens
        if not self.step_tokens:
            object.__setattr__(self, "step_tokens", max(page, MIN_STEP_TOKENS))
        if page < 1 or not self.plane_bytes or min(self.plane_bytes) < 1:
            raise ValueError(
                f"not a KV layout: {page} tokens a page, planes of {self.plane_bytes} bytes"
            )
        if self.step_tokens % page:
            raise ValueError(
                f"pages of {page} tokens are not supported: neither a divisor of {MIN_STEP_TOKENS} "
                "nor more than that"
            )
        if chunk < self.min_chunk_tokens:
            raise ValueError(
                f"LMC_CHUNK_TOKENS={chunk}: below {self.min_chunk_tokens} tokens a chunk costs "
                "more to name and to read than its tokens cost to recompute"
            )
        if chunk % page or chunk % self.step_tokens:
            raise ValueError(
                f"LMC_CHUNK_TOKENS={chunk}: must be a multiple of {MIN_STEP_TOKENS} and of the "
                f"engine's page, {page} tokens: a chunk is made of whole pages"
            )
        if self.chunk_steps > MAX_CHUNK_STEPS:
            raise ValueError(
                f"LMC_CHUNK_TOKENS={chunk}: at most {MAX_CHUNK_STEPS * self.step_tokens} tokens "
                f"for pages of {page} tokens"
            )
        object.__setattr__(self, "page_bytes", sum(self.plane_bytes))

    @property
    def step_pages(self) -> int:
        return self.step_tokens // self.page_tokens

    @property
    def chunk_steps(self) -> int:
        return self.chunk_tokens // self.step_tokens

    @property
    def chunk_pages(self) -> int:
        return self.chunk_tokens // self.page_tokens

    @property
    def chunk_bytes(self) -> int:
        """Payload of a whole chunk."""
        return self.chunk_pages * self.page_bytes

    def payload_bytes(self, num_steps: int) -> int:
        """Payload of a chunk or tail of `num_steps` steps."""
        return num_steps * self.step_pages * self.page_bytes

    def plane_offset(self, plane: int, num_pages: int) -> int:
        """Where plane `plane` begins in the payload of a chunk of `num_pages` pages."""
        return num_pages * list(accumulate(self.plane_bytes, initial=0))[plane]

    def describe(self) -> dict[str, str]:
        """What of this layout belongs into the namespace."""
        described = {
            "page_tokens": str(self.page_tokens),
            "chunk_tokens": str(self.chunk_tokens),
            "plane_bytes": _run_lengths(self.plane_bytes),
        }
        if self.step_tokens != max(self.page_tokens, MIN_STEP_TOKENS):
            described["step_tokens"] = str(self.step_tokens)
        return described


def _run_lengths(sizes: Sequence[int]) -> str:
    """ "60x3072" for sixty planes of 3072 bytes."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return ",".join(f"{count}x{size}" for count, size in runs)
