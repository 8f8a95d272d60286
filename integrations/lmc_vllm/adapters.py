"""What an adapter's KV is called. vLLM's block hashes know a LoRA adapter's name and path, not its
weights, and its workers read the files when they need them: at first use, and again once they let
the adapter go, whatever the files hold by then. So two look at them:

    scheduler   as a request arrives, on a thread of its own: what its chunks would be called
    workers     around each load: what they really compute with; told with their next report

A request has a name, its mark, only where all of these agree; any other is served without lmc.

Why nothing is committed under a name that is not its own, however many steps are under way:

- A worker notes a load before the forward that computes with it, and its reports are in its own
  order: one that says that a store of that forward's blocks is over says so with or after the load.
- A store is committed when its last worker has said so. By then all loads that its blocks hang on
  were applied, loads first within a report.
- Applying a load that is not what was thought voids the stores begun under another mark, those of
  steps planned ahead included, and takes away their requests' names.
- What vLLM's own prefix cache still holds of earlier contents has the same hash. A request that
  begins on blocks of a name that ever stood for something else has no name either; nor one that
  has begun, when it turns out that the name did.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from lmc.keys import Key
from lmc.weights import fingerprint, model_folder, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from .wire import Loaded

log = logging.getLogger("lmc")

SETTLED_S = 2.0
"""A file that was written less than this ago may change again without its times telling."""


class _Files(NamedTuple):
    path: str
    is_3d: bool  # how vLLM is told to read them


def digest_of(folder: Path, *, is_3d: bool) -> bytes:
    """What KV computed with this adapter hangs on. Raises OSError."""
    return hashlib.sha256(f"{fingerprint(folder)} {is_3d}".encode()).digest()


def folded(mark: bytes, key: bytes) -> Key:
    return Key(hashlib.sha256(mark + key).digest())


class Adapters:
    """Owned by the scheduler's thread; `_work` and what it calls run on a thread of their own, and
    share with it what `_wake` guards.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._loaded: dict[int, dict[tuple[int, int], Loaded]] = {}  # by number and rank: the last
        self._held: dict[tuple[str, str], set[bytes | None]] = {}  # what vLLM's blocks may be of
        self._wake = threading.Condition()
        self._asked: dict[_Files, Future[bytes | None]] = {}
        self._closing = False
        self._thread: threading.Thread | None = None
        self._seen: dict[_Files, tuple[Any, bytes]] = {}  # the thread's own

    def look(self, lora: Any) -> Future[bytes | None]:
        """Begin to look at an adapter's files as they are from now on; None: they cannot be
        read.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="lmc-adapters")
            self._thread.start()
        with self._wake:
            self._wake.notify()
            return self._asked.setdefault(_Files(lora.lora_path, lora.is_3d_lora_weight), Future())

    def mark(self, lora: Any, seen: bytes | None) -> bytes | None:
        """What to fold into the keys of a request whose adapter's files looked like `seen`; None
        where workers compute with something else.
        """
        loaded = {load.digest for load in self._loaded.get(lora.lora_int_id, {}).values()}
        return seen if loaded <= {seen} else None

    def computes(self, lora: Any, mark: bytes) -> bool:
        """Whether all workers said that they compute with it."""
        loaded = self._loaded.get(lora.lora_int_id, {}).values()
        return len(loaded) == self._num_workers and all(load.digest == mark for load in loaded)

    def was_another(self, lora: Any, mark: bytes) -> bool:
        """Whether vLLM's own cache may hold blocks of that name and other contents."""
        return bool(self._held.get((lora.lora_name, lora.lora_path), set()) - {mark})

    def apply(self, load: Loaded) -> None:
        """A worker loaded an adapter."""
        self._loaded.setdefault(load.number, {})[load.rank] = load
        self._held.setdefault(load.name, set()).add(load.digest)

    def forget_blocks(self) -> None:
        """Whatever vLLM's own cache holds, it is not of what was loaded earlier."""
        self._held = {}
        for loads in self._loaded.values():
            for load in loads.values():
                self._held.setdefault(load.name, set()).add(load.digest)

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()

    # --- on the thread

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._asked or self._closing)
                if self._closing:
                    return
                files = next(iter(self._asked))
                future = self._asked.pop(files)
            future.set_result(self._digest(files))

    def _digest(self, files: _Files) -> bytes | None:
        """From the files' times and sizes if these were seen before, and else from what is in
        them.
        """
        try:
            folder = model_folder(os.path.expanduser(files.path), None, None)
            state = state_of(folder)
            known = self._seen.pop(files, None)
            if known is None or known[0] != state:
                known = state, digest_of(folder, is_3d=files.is_3d)
            if time.time() - max(changed_ns for *_, changed_ns in state.values()) / 1e9 > SETTLED_S:
                self._seen[files] = known
        except (OSError, ValueError) as error:
            log.info("lmc cannot tell adapter %s apart from others: %s", files.path, error)
            return None
        return known[1]
