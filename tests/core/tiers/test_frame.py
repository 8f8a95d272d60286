"""The frame: every field that is damaged is told by its cause, every flipped bit is seen."""

from __future__ import annotations

import struct

import pytest
import xxhash

from lmc.keys import FORMAT_VERSION, Key, Namespace
from lmc.layout import ALIGN, KVLayout
from lmc.tiers.arena import FRAME_BYTES
from lmc.tiers.frame import MAGIC, Damaged, blob_bytes, seal, verify
from tests.core.chunks import LAYOUT, NAMESPACE, keys_of, payload_of

KEYS = tuple(keys_of("frame", 4))
_SUM_AT = 32


def sealed(
    keys: tuple[Key, ...] = KEYS, namespace: Namespace = NAMESPACE, layout: KVLayout = LAYOUT
) -> bytearray:
    """A slot with a framed chunk in it."""
    slot = bytearray(b"\xee" * blob_bytes(layout, layout.chunk_steps))
    payload = payload_of(keys)
    slot[FRAME_BYTES : FRAME_BYTES + len(payload)] = payload
    return bytearray(seal(memoryview(slot), namespace, keys, layout))


def check(blob: bytearray, key: Key = KEYS[3], steps: int = 4, size: int | None = None) -> str:
    """What `verify` says: "ok" or the cause."""
    size = len(blob) if size is None else size
    try:
        keys = verify(memoryview(blob), size, NAMESPACE, key, steps, LAYOUT)
    except Damaged as damaged:
        return damaged.cause
    assert keys[steps - 1] == key
    return "ok"


def reseal(blob: bytearray) -> bytearray:
    """Make the header sum right again, as somebody who writes such a header would."""
    blob[_SUM_AT : _SUM_AT + 8] = bytes(8)
    total = xxhash.xxh3_64_intdigest(bytes(blob[:FRAME_BYTES]))
    blob[_SUM_AT : _SUM_AT + 8] = total.to_bytes(8, "little")
    return blob


def test_sealed_chunk_answers_for_each_of_its_steps() -> None:
    blob = sealed()
    for steps, key in enumerate(KEYS, 1):
        assert verify(memoryview(blob), len(blob), NAMESPACE, key, steps, LAYOUT) == KEYS


def test_frame_as_documented() -> None:
    blob = sealed(KEYS[:3])
    magic, version, num_keys, size, total, _, digest = struct.unpack_from("<8sIIQQQ32s", blob)
    payload = payload_of(KEYS[:3])
    assert (magic, version, num_keys, size) == (MAGIC, FORMAT_VERSION, 3, len(payload))
    assert total == xxhash.xxh3_64_intdigest(payload)
    assert digest == NAMESPACE.digest
    assert blob[72:104] == bytes(32), "no parent"
    assert blob[104 : 104 + 96] == b"".join(KEYS[:3])
    assert blob[104 + 96 : FRAME_BYTES] == bytes(FRAME_BYTES - 200)
    assert len(blob) == FRAME_BYTES + ALIGN
    assert blob[FRAME_BYTES + len(payload) :] == bytes(ALIGN - len(payload))


def test_every_flipped_bit_is_a_miss_or_does_not_matter() -> None:
    """Exhaustive. Only the padding behind the payload is not covered by a sum; nobody reads it."""
    blob = sealed()
    padding = FRAME_BYTES + len(payload_of(KEYS))
    for bit in range(8 * len(blob)):
        at = bit // 8
        blob[at] ^= 1 << bit % 8
        cause = check(blob)
        blob[at] ^= 1 << bit % 8
        if at < 8:
            assert cause == "magic"
        elif at < 12:
            assert cause == "version"
        elif at < FRAME_BYTES:
            assert cause == "header"
        elif at < padding:
            assert cause == "checksum"
        else:
            assert cause == "ok"
    assert check(blob) == "ok"


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1])
def test_cut_in_the_frame_block(size: int) -> None:
    assert check(sealed(), size=size) == "truncated"


@pytest.mark.parametrize("size", [FRAME_BYTES, FRAME_BYTES + 1, FRAME_BYTES + ALIGN - 1])
def test_cut_in_the_payload(size: int) -> None:
    assert check(sealed(), size=size) == "truncated"


def test_longer_than_its_frame_says() -> None:
    assert check(sealed(), size=FRAME_BYTES + ALIGN + 1) == "size"


def test_blob_of_the_right_size_that_the_slot_has_cut() -> None:
    blob = sealed()
    assert check(blob[: FRAME_BYTES + 512], size=len(blob)) == "size"


def test_block_of_zeros_and_of_ones() -> None:
    assert check(bytearray(2 * ALIGN)) == "magic"
    assert check(bytearray(b"\xff" * 2 * ALIGN)) == "magic"


def test_other_versions() -> None:
    for version in (0, FORMAT_VERSION + 1, 2**32 - 1):
        blob = sealed()
        struct.pack_into("<I", blob, 8, version)
        assert check(reseal(blob)) == "version"


def test_another_namespace() -> None:
    assert check(sealed(namespace=Namespace.of({"model": "other"}))) == "namespace"


@pytest.mark.parametrize("num_keys", [0, 3, 5, 2**32 - 1])
def test_number_of_steps_that_does_not_fit_the_payload(num_keys: int) -> None:
    blob = sealed()
    struct.pack_into("<I", blob, 12, num_keys)
    assert check(reseal(blob)) == "layout"


def test_size_that_is_not_the_layouts() -> None:
    blob = sealed()
    struct.pack_into("<Q", blob, 16, len(payload_of(KEYS)) - 1)
    assert check(reseal(blob)) == "layout"


def test_more_steps_than_a_chunk_has() -> None:
    long = KVLayout(16, 128, LAYOUT.plane_bytes)
    assert check(sealed(tuple(keys_of("frame", 8)), layout=long)) == "layout"


def test_another_chunk_under_this_name() -> None:
    assert check(sealed(tuple(keys_of("other", 4)))) == "key"


def test_a_step_asked_for_by_the_wrong_number() -> None:
    assert check(sealed(), KEYS[2], 4) == "key"
    assert check(sealed(), KEYS[2], 2) == "key"


def test_a_tail_that_is_too_short_for_the_step() -> None:
    assert check(sealed(KEYS[:2]), KEYS[3], 4) == "key"


def test_swapped_payload() -> None:
    blob, other = sealed(), sealed(tuple(keys_of("other", 4)))
    blob[FRAME_BYTES:] = other[FRAME_BYTES:]
    assert check(blob) == "checksum"


def test_damage_says_its_cause() -> None:
    assert str(Damaged("checksum")) == "checksum"
