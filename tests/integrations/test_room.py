"""How much of the memory and the disk that lmc takes holds KV, after many chats."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from lmc.tiers.frame import blob_bytes
from tests.integrations.harness import Harness, tokens

if TYPE_CHECKING:
    from array import array

SYSTEM = 600


def chats(h: Harness, count: int, turns: int, seed: int = 0) -> list[array]:
    """Interleaved conversations on one system prompt, each turn a prompt and then its answer."""
    rng = random.Random(seed)
    open_chats = [tokens(1, SYSTEM) + tokens(100 + n, 80) for n in range(count)]
    for turn in range(turns):
        for n in range(count):
            for part in (rng.randrange(30, 250), rng.randrange(60, 400)):
                open_chats[n] = open_chats[n] + tokens(1000 * turn + 2 * n + part, part)
                h.run(open_chats[n])
                h.settle()
    return open_chats


def test_full_ram_holds_mostly_kv(harness):
    h = harness(size=16384, LMC_RAM_GB="0.05")
    chats(h, count=12, turns=6)
    assert h.store.ram.evictions > 0
    layout = h.store.layout
    live = layout.payload_bytes(h.store.ram.live_steps())
    assert h.store.ram.num_free == 0
    assert live / (h.store.arena.num_slots * h.store.arena.slot_bytes) >= 0.85


def test_disk_holds_every_token_once_or_little_more(harness, tmp_path):
    h = harness(size=16384, LMC_RAM_GB="0.5", LMC_TIERS=f"file://{tmp_path}?gb=5")
    ends = chats(h, count=8, turns=5)
    assert h.store.drain(30)
    files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("chunks/*/*")}
    layout = h.store.layout
    unique_tokens = SYSTEM + sum(len(h.whole(ids)) - SYSTEM for ids in ends)
    assert sum(files.values()) / (unique_tokens * layout.page_bytes / layout.page_tokens) <= 1.3
    assert max(files.values()) <= blob_bytes(layout, layout.chunk_steps)
