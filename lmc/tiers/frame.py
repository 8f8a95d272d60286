"""The frame block in front of every chunk that leaves RAM: who wrote what, checked before any byte
is used.

    0       8         12         16      24            32           40          72       104
    | magic | version | num_keys | bytes | payload sum | header sum | namespace | parent | keys

`bytes` are the payload's. Sums are xxh3-64; the header sum covers the block's fields with itself as
zero. The block is 4 KiB, the payload follows, padded with zeros to 4 KiB. The keys are the engine's
digests, of the chunk before (zeros at the start of a sequence) and of every step: a chunk answers
for each of its steps, so a tail's name may lead to the longer chunk that replaced it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import xxhash

from ..keys import FORMAT_VERSION, KEY_BYTES, Key, Namespace, split_keys
from ..layout import KVLayout, aligned
from .arena import FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"lmcchunk"
_HEAD = struct.Struct("<8sIIQQQ32s32s")
_SUM_AT = 32
_NO_PARENT = bytes(KEY_BYTES)


class Damaged(Exception):
    """Bytes from outside that are not what was asked for; `cause` names what gave them away."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def blob_bytes(layout: KVLayout, num_steps: int) -> int:
    """Size of a framed chunk of `num_steps` steps."""
    return FRAME_BYTES + aligned(layout.payload_bytes(num_steps))


def seal(
    slot: memoryview,
    namespace: Namespace,
    keys: Sequence[Key],
    layout: KVLayout,
    parent: Key | None = None,
) -> memoryview:
    """Frame the payload in `slot` for the world outside; returns the blob to write.

    Fills the frame block and the padding, so nobody else may use them: a chunk is sealed under its
    pin, once a tier.
    """
    size = layout.payload_bytes(len(keys))
    blob = slot[: blob_bytes(layout, len(keys))]
    blob[FRAME_BYTES + size :] = bytes(len(blob) - FRAME_BYTES - size)
    blob[:FRAME_BYTES] = header(blob[FRAME_BYTES : FRAME_BYTES + size], namespace, keys, parent)
    return blob


def header(
    payload: memoryview, namespace: Namespace, keys: Sequence[Key], parent: Key | None = None
) -> bytes:
    """The frame block of a payload."""
    total = xxhash.xxh3_64_intdigest(payload)
    fields = [MAGIC, FORMAT_VERSION, len(keys), len(payload), total, 0, namespace.digest]
    fields.append(parent or _NO_PARENT)
    block = bytearray((_HEAD.pack(*fields) + b"".join(keys)).ljust(FRAME_BYTES, b"\0"))
    block[_SUM_AT : _SUM_AT + 8] = xxhash.xxh3_64_intdigest(block).to_bytes(8, "little")
    return bytes(block)


def verify(
    blob: memoryview, num_bytes: int, namespace: Namespace, key: Key, steps: int, layout: KVLayout
) -> tuple[Key, ...]:
    """Step keys of the chunk that was read into `blob`, `num_bytes` long, when asked for `key`,
    the key of the chunk's step number `steps`.

    Raises `Damaged` unless all of it is as written, for this namespace, layout and key.
    """
    keys, _, payload_sum = parse(blob, num_bytes, namespace, layout)
    if steps > len(keys) or keys[steps - 1] != key:
        raise Damaged("key")
    check_payload(blob, num_bytes, len(keys), payload_sum, layout)
    return keys


def parse(
    blob: memoryview, num_bytes: int, namespace: Namespace, layout: KVLayout
) -> tuple[tuple[Key, ...], Key | None, int]:
    """Step keys, parent and payload sum that the frame block of a blob of `num_bytes` tells of.

    Raises `Damaged` unless the block is as written, for this namespace and layout.
    """
    if num_bytes < FRAME_BYTES:
        raise Damaged("truncated")
    block = bytearray(blob[:FRAME_BYTES])
    magic, version, num_keys, size, payload_sum, header_sum, digest, parent = _HEAD.unpack_from(
        block
    )
    if magic != MAGIC:
        raise Damaged("magic")
    if version != FORMAT_VERSION:
        raise Damaged("version")
    block[_SUM_AT : _SUM_AT + 8] = bytes(8)
    if xxhash.xxh3_64_intdigest(block) != header_sum:
        raise Damaged("header")
    if digest != namespace.digest:
        raise Damaged("namespace")
    if not 0 < num_keys <= layout.chunk_steps or size != layout.payload_bytes(num_keys):
        raise Damaged("layout")
    at = _HEAD.size
    keys = split_keys(block[at : at + num_keys * KEY_BYTES])
    return keys, None if parent == _NO_PARENT else Key(parent), payload_sum


def check_payload(
    blob: memoryview, num_bytes: int, num_steps: int, payload_sum: int, layout: KVLayout
) -> None:
    """Raises `Damaged` unless the payload of a blob of `num_bytes` is as written."""
    whole = blob_bytes(layout, num_steps)
    if num_bytes != whole or num_bytes > len(blob):
        raise Damaged("truncated" if num_bytes < whole else "size")
    size = layout.payload_bytes(num_steps)
    if xxhash.xxh3_64_intdigest(blob[FRAME_BYTES : FRAME_BYTES + size]) != payload_sum:
        raise Damaged("checksum")
