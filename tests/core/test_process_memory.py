"""A process takes the memory that LMC_RAM_GB grants and little more, however long it runs."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import hashlib
from pathlib import Path
from lmc.keys import Key, Namespace
from lmc.layout import KVLayout
from lmc.store import TieredStore
from lmc.tiers.ram import Chunk

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def chain(seed, steps):
    keys = [Key(hashlib.sha256(b"%d/%d" % (seed, i)).digest()) for i in range(steps)]
    return [Chunk(tuple(keys[i:i + 16]), keys[i - 1] if i else None) for i in range(0, steps, 16)]

BYTES = 400_000_000
before = resident()
store = TieredStore(KVLayout(16, 256, (8192,) * 8), Namespace.of({}), BYTES)
for seed in range(60):
    lease = store.reserve(chain(seed, 16 * 12 + 5))
    for slot in lease.slots:
        store.arena.payload(slot)[:] = bytes(store.layout.chunk_bytes)
    lease.commit()
assert store.ram.evictions > 200 and store.ram.num_free == 0
print((resident() - before) / BYTES)
store.close(0)
"""


def test_memory_stays_within_five_percent_of_what_was_granted():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd="."
    )
    assert 0.9 <= float(run.stdout) <= 1.05
