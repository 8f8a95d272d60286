"""Keys and names: the same everywhere, and different for everything that changes the bytes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.keys import FORMAT_VERSION, KEY_BYTES, Key, KeyChain, Namespace

_PROGRAM = """
from array import array
from lmc.keys import Key, KeyChain, Namespace
namespace = Namespace.of({"model": "m", "dtype": "bfloat16", "salt": "s"})
keys = KeyChain(b"root", 16).extend(array("q", range(64)))
print(keys[-1].hex(), namespace.fold(keys[0]).hex(), namespace.digest.hex())
"""
GOLDEN = (
    "1eaeccfaefc6976b43fb64788c30f2024363791e81e2dde62bceab98ff2b5d72",
    "894f238aa6fe809cebe1f6f56aea3e0c0e59303882e32867941a3d73eb0ed02a",
    "4ea326d8bf68aa726f6474f8fcb9fb98ffddb1ed44709ea429abddbb01984c9e",
)
"""Pinned: chunks stored earlier would be lost, or worse, found, if these changed without
a new FORMAT_VERSION.
"""


def test_golden_vectors() -> None:
    assert FORMAT_VERSION == 1
    namespace = Namespace.of({"model": "m", "dtype": "bfloat16", "salt": "s"})
    keys = KeyChain(b"root", 16).extend(array("q", range(64)))
    assert len(keys) == 4
    assert (keys[-1].hex(), namespace.fold(keys[0]).hex(), namespace.digest.hex()) == GOLDEN


def test_golden_vectors_as_written_in_words() -> None:
    def sized(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode()

    fields = sorted({"model": "m", "dtype": "bfloat16", "salt": "s"}.items())
    digest = hashlib.sha256(
        b"lmc-namespace"
        + FORMAT_VERSION.to_bytes(4, "little")
        + b"".join(sized(part) for item in fields for part in item)
    ).digest()
    key = hashlib.sha256(b"lmc-chain" + (16).to_bytes(8, "little") + b"root").digest()
    keys = []
    for step in range(4):
        tokens = b"".join(t.to_bytes(8, "little") for t in range(16 * step, 16 * step + 16))
        key = hashlib.sha256(key + tokens).digest()
        keys.append(key)
    name = hashlib.sha256(digest + keys[0]).digest()
    assert (keys[-1].hex(), name.hex(), digest.hex()) == GOLDEN


def test_fifty_processes_agree_whatever_their_hash_seed() -> None:
    def start(seed: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _PROGRAM],
            env={
                **os.environ,
                "PYTHONHASHSEED": str(seed),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.PIPE,
            text=True,
        )

    answers = set()
    for batch in range(10):
        running = [start(1 + 997 * (5 * batch + n)) for n in range(5)]
        for process in running:
            answers.add(process.communicate(timeout=60)[0])
            assert process.returncode == 0
    assert answers == {" ".join(GOLDEN) + "\n"}


@pytest.mark.parametrize(
    "others",
    [
        {"ab": "c"},
        {"a": "b", "c": ""},
        {"a": "bc", "": ""},
        {"": "abc"},
        {"a": "b\0c"},
        {"bc": "a"},
        {"a": "bc\n"},
        {},
    ],
)
def test_fields_do_not_collide_by_joining(others: dict[str, str]) -> None:
    assert Namespace.of({"a": "bc"}) != Namespace.of(others)


@given(
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
)
def test_namespaces_are_equal_exactly_when_their_fields_are(
    one: dict[str, str], other: dict[str, str]
) -> None:
    assert (Namespace.of(one) == Namespace.of(other)) == (one == other)


def test_order_of_fields_does_not_matter() -> None:
    assert Namespace.of({"a": "1", "b": "2"}) == Namespace.of({"b": "2", "a": "1"})


def test_salt_may_be_any_bytes() -> None:
    odd = [b"\xff\xfe".decode("utf-8", "surrogateescape"), "\ud800", "\0", "", "\u00e9", "e\u0301"]
    assert len({Namespace.of({"salt": salt}).digest for salt in odd}) == len(odd)


def test_generations_are_private_and_never_meet_again() -> None:
    first = Namespace.of({"model": "m"})
    assert not first.private
    generations = [first.next_generation(), first.next_generation()]
    generations.append(generations[0].next_generation())
    assert all(generation.private for generation in generations)
    assert len({first.digest, *(g.digest for g in generations)}) == 4


def test_names_depend_on_namespace_and_key() -> None:
    one, other = Namespace.of({"model": "m"}), Namespace.of({"model": "n"})
    key, next_key = Key(bytes(32)), Key(bytes(31) + b"\1")
    names = {one.fold(key), one.fold(next_key), other.fold(key), other.fold(next_key)}
    assert len(names) == 4
    assert {len(name) for name in names} == {KEY_BYTES}


# --- chains


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70), st.data())
def test_chain_is_the_same_however_tokens_arrive(tokens: list[int], data: st.DataObject) -> None:
    whole = KeyChain(b"root", 4).extend(array("q", tokens))
    assert len(whole) == len(tokens) // 4
    pieces = KeyChain(b"root", 4)
    at = 0
    while at < len(tokens):
        n = data.draw(st.integers(1, len(tokens) - at))
        pieces.extend(array("q", tokens[at : at + n]))
        at += n
    assert pieces.keys == whole


def test_key_covers_every_token_before() -> None:
    tokens = array("q", range(64))
    keys = KeyChain(b"root", 16).extend(tokens)
    for at in range(64):
        other = array("q", tokens)
        other[at] += 1
        changed = KeyChain(b"root", 16).extend(other)
        same = at // 16
        assert changed[:same] == keys[:same]
        assert not set(changed[same:]) & set(keys)


def test_chains_of_other_roots_or_steps_share_nothing() -> None:
    tokens = array("q", range(64))
    chains = [
        KeyChain(root, step).extend(tokens)
        for root in (b"", b"\0", b"root", b"root\0", tokens[:2].tobytes())
        for step in (1, 2, 4, 16)
    ]
    assert len({key for chain in chains for key in chain}) == sum(map(len, chains))


def test_root_that_looks_like_tokens_is_no_token() -> None:
    tokens = array("q", [7, 8])
    swallowed = KeyChain(tokens[:1].tobytes(), 1).extend(tokens[1:])
    assert swallowed[-1] != KeyChain(b"", 2).extend(tokens)[-1]


def test_image_pad_ids_are_told_apart() -> None:
    pad = 1 << 62
    one = KeyChain(step_tokens=1).extend(array("q", [pad, pad + 1]))
    low = KeyChain(step_tokens=1).extend(array("q", [0, 1]))
    other = KeyChain(step_tokens=1).extend(array("q", [pad + (1 << 32), pad + 1]))
    assert len({*one, *low, *other}) == 6


def test_numpy_and_ctypes_buffers_are_taken_as_they_are() -> None:
    expected = KeyChain(step_tokens=4).extend(array("q", range(8)))
    numbers = np.arange(8, dtype=np.int64)
    assert KeyChain(step_tokens=4).extend(numbers) == expected
    assert KeyChain(step_tokens=4).extend(numbers.data) == expected
    assert KeyChain(step_tokens=4).extend(array("l", range(8))) == expected


def test_empty_and_short_prompts_have_no_keys() -> None:
    chain = KeyChain(step_tokens=16)
    assert chain.extend(array("q")) == []
    assert chain.extend(np.empty(0, dtype=np.int64)) == []
    assert chain.extend(array("q", range(15))) == []
    assert len(chain.extend(array("q", [15]))) == 1


@pytest.mark.parametrize(
    "tokens",
    [
        array("i", range(16)),
        array("Q", range(16)),
        array("d", range(16)),
        np.arange(16, dtype=np.int32),
        np.arange(16, dtype=np.uint64),
        np.arange(16, dtype=">i8"),
        np.arange(32, dtype=np.int64)[::2],
        np.arange(16, dtype=np.int64).reshape(4, 4),
        b"0123456789abcdef",
        (ctypes.c_int32 * 16)(),
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{memoryview(tokens).format}",
)
def test_other_buffers_are_refused_by_name(tokens: object) -> None:
    with pytest.raises(TypeError, match="contiguous buffer of int64, not format"):
        KeyChain().extend(tokens)


@pytest.mark.parametrize("tokens", [[1, 2], "text", 5, None])
def test_what_is_no_buffer_is_refused(tokens: object) -> None:
    with pytest.raises(TypeError):
        KeyChain().extend(tokens)


def test_refused_buffer_leaves_the_chain_as_it_was() -> None:
    chain = KeyChain(step_tokens=2)
    chain.extend(array("q", [1]))
    with pytest.raises(TypeError):
        chain.extend(array("i", [2]))
    assert chain.extend(array("q", [2])) == KeyChain(step_tokens=2).extend(array("q", [1, 2]))


@pytest.mark.parametrize("step", [0, -1])
def test_step_below_one_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="step_tokens must be at least 1"):
        KeyChain(step_tokens=step)
