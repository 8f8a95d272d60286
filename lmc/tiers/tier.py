"""What a place below RAM is. Verbs may block and may raise; they run on that tier's own threads,
never elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..keys import Name


class Tier(Protocol):
    """Slower storage for framed chunks ("blobs"). Thread safe. A blob is opaque: framing and
    checking are not its task.

    A tier may lose, delay or damage what it was given: the reader checks. It must not invent other
    guarantees.
    """

    name: str
    """Short, for counters and log lines."""
    persistent: bool
    """Whether blobs outlive the process."""

    def probe(self, names: Sequence[Name]) -> int:
        """How many leading names are here; counts as a use of them, of the first as the last: a
        chain is let go from its end.
        """
        ...

    def read(self, name: Name, into: memoryview) -> int:
        """Read a blob into the beginning of `into` (4 KiB aligned memory) and return its size; 0 if
        it is not here.

        A blob larger than `into` is cut; the size returned tells.
        """
        ...

    def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
        """Keep `blob`; one already here under this name stays.

        `shorter` names tails whose steps are all in `blob`. Those that are here may go; each of
        their names should then lead to `blob`.
        """
        ...

    def hottest(self, most: int) -> Sequence[Name]:
        """One name of each of the `most` blobs used last, the last one first; empty where the tier
        cannot tell. Asked once, after a start.
        """
        ...

    def forget(self, name: Name) -> None:
        """Drop a blob that turned out to be wrong."""
        ...

    def close(self) -> None:
        """Release what is held. No verb is called after it."""
        ...
