"""Keys name chunks; names carry keys out of the process.

A key is the engine's own chained digest of a page: it covers every token up to that page's end.
Inside one process that is enough. What leaves the process (a file, a remote object) is called by a
`Name`: the key folded with the `Namespace`, which covers everything else that changes the bytes.
Nothing here depends on PYTHONHASHSEED.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping

Key = NewType("Key", bytes)
"""32 bytes: an engine's digest of all tokens up to the end of one page."""

Name = NewType("Name", bytes)
"""32 bytes: a key folded with a namespace; equal names mean equal bytes anywhere."""

KEY_BYTES = 32
FORMAT_VERSION = 1
"""Version of everything lmc itself writes: frame, chunk layout, naming. Part of every namespace."""


def split_keys(joined: bytes | bytearray | memoryview) -> tuple[Key, ...]:
    """Keys that were joined into one piece of memory."""
    return struct.unpack(f"{KEY_BYTES}s" * (len(joined) // KEY_BYTES), joined)


@dataclass(frozen=True, slots=True)
class Namespace:
    """Digest of all that changes the bytes of a chunk apart from its tokens.

    `private` namespaces can never be reached again by another process (weights were changed in
    place), so tiers that outlive the process are of no use to them.
    """

    digest: bytes
    private: bool = False

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> Namespace:
        """Digest named fields. Names and values are length-prefixed, so no two field sets collide
        by joining.
        """
        h = hashlib.sha256(b"lmc-namespace")
        h.update(FORMAT_VERSION.to_bytes(4, "little"))
        for item in sorted(fields.items()):
            for part in item:
                raw = part.encode("utf-8", "surrogatepass")  # a path or a salt may be any bytes
                h.update(len(raw).to_bytes(8, "little") + raw)
        return cls(h.digest())

    def next_generation(self) -> Namespace:
        """A namespace for changed weights: random, hence private to this process."""
        return Namespace(hashlib.sha256(self.digest + os.urandom(32)).digest(), private=True)

    def fold(self, key: Key) -> Name:
        """The name of `key` outside this process."""
        return Name(hashlib.sha256(self.digest + key).digest())


class KeyChain:
    """Keys of a growing token sequence, one per `step_tokens`, for use without an engine.

    `extend` hashes only the steps it completes:
    key i = sha256(key i-1 || the step's tokens as int64 little endian). `root` is any bytes that
    tell this chain from others; with the step it is digested into the key before the first.
    """

    def __init__(self, root: bytes = b"", step_tokens: int = 16) -> None:
        if step_tokens < 1:
            raise ValueError(f"step_tokens must be at least 1, not {step_tokens}")
        self.keys: list[Key] = []
        head = b"lmc-chain" + step_tokens.to_bytes(8, "little")
        self._parent = hashlib.sha256(head + root).digest()
        self._tail = b""
        self._step_bytes = 8 * step_tokens

    def extend(self, tokens: memoryview | bytes | bytearray | object) -> list[Key]:
        """Append int64 tokens (`array("q")`, a NumPy int64 array, ...) and return all keys so far.

        Tokens of an unfinished step are kept for the next call. Raises TypeError for any other
        element type: a silent conversion would cost more than the hashing, and int32 cannot hold
        the ids of image pads.
        """
        view = memoryview(tokens)  # type: ignore[arg-type]
        if (
            view.format not in ("q", "l")
            or view.itemsize != 8
            or view.ndim != 1
            or not view.c_contiguous
        ):
            raise TypeError(
                f"tokens must be a contiguous buffer of int64, not format {view.format!r}"
            )
        raw = view.cast("B")
        if self._tail:
            raw = memoryview(self._tail + bytes(raw))
        step, parent, sha256, keys = self._step_bytes, self._parent, hashlib.sha256, self.keys
        whole = len(raw) // step * step
        for start in range(0, whole, step):
            h = sha256(parent)
            h.update(raw[start : start + step])
            parent = h.digest()
            keys.append(Key(parent))
        self._parent = parent
        self._tail = bytes(raw[whole:])
        return keys
