"""SGLang's server with lmc on a disk that gives trouble, as the file that TROUBLE names says:

    {"read_mb_s": 20, "errors": 0.1, "flips": 0.1, "cuts": 0.1, "losses": 0.1, "hangs_s": 5}

Rates are probabilities of a call. The file may change while the server runs, reads under way then
go on at the new speed; `{}` is no trouble. Two more keys are about requests that wait for the disk:

    {"always_wait": true}   as long as anything is on its way, however long that takes
    {"learn": false}        how fast the disk was is not learned from them
Started like `python -m sglang.launch_server`.
"""

import errno
import json
import os
import random
import sys
import time
from pathlib import Path

import lmc_sglang  # noqa: F401
from lmc import tiers
from lmc.testing import FaultyTier
from lmc_sglang.patience import Patience

TROUBLE = Path(os.environ["TROUBLE"])


class Troubled(FaultyTier):
    """`tier`, with faults by chance. What comes back wrong must be noticed: nothing is told."""

    def __init__(self, tier):
        super().__init__(tier)
        self._random = random.Random(7)
        self._free_at = 0.0

    def _next(self, verb):
        from lmc.testing import Fault

        with self._lock:
            self.calls[verb] += 1
            plan = _plan()
            dice = self._random.random()
            bit = self._random.randrange(1 << 24)
        if verb not in ("read", "write", "probe"):
            return Fault()
        if "hangs_s" in plan and dice > 0.97:
            return Fault(delay_s=plan["hangs_s"])
        for kind, fault in (
            ("errors", Fault(error=OSError(errno.EIO, "injected"))),
            ("flips", Fault(flip_bit=bit)),
            ("cuts", Fault(cut=bit % 20_000)),
            ("losses", Fault(lose=True)),
        ):
            dice -= plan.get(kind, 0)
            if dice < 0:
                return fault
        return Fault()

    def read(self, name, into):
        started = time.monotonic()
        size = super().read(name, into)
        rate = _plan().get("read_mb_s")
        if rate and size > 4096:  # a disk of that speed, whatever the number of threads
            with self._lock:
                self._free_at = max(self._free_at, started) + size / rate / 1e6
                end = self._free_at
            while (left := end - time.monotonic()) > 0:
                if _plan().get("read_mb_s") != rate:
                    self._free_at = 0.0
                    break
                time.sleep(min(left, 0.05))
        return size


def _plan():
    return json.loads(TROUBLE.read_text() or "{}")


def _waits(patience, wait, outlook, _waits=Patience.waits):
    return bool(_plan().get("always_wait")) or _waits(patience, wait, outlook)


def _landed(patience, *what, _landed=Patience.landed):
    if _plan().get("learn", True):
        _landed(patience, *what)


Patience.waits, Patience.landed = _waits, _landed


_open_disk = tiers._OPENERS["file"]
tiers._OPENERS["file"] = lambda url: Troubled(_open_disk(url))  # in the scheduler's process as well

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
