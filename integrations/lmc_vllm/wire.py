"""What scheduler and workers tell each other: numbers only. A slot travels, a lease does not.

    worker    -> scheduler  Registered   at start: what a worker's pages look like
    scheduler -> worker     Step         every step: what to copy
    worker    -> scheduler  Report       when there is news: which stores are over, which adapters
                                         were loaded

All of it goes through vLLM's own channels.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from collections import Counter

    from lmc.tiers.arena import ArenaHandle


def machine_id() -> str:
    """The same for two processes exactly if they share this machine's memory and processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class Run(NamedTuple):
    """Pages `first .. first + pages` of the chunk of `total` pages in a slot."""

    slot: int
    total: int
    first: int
    pages: int


class Move(NamedTuple):
    """Blocks of one KV cache group and, in the same order, where they lie in host memory."""

    group: int
    block_ids: list[int]
    runs: list[Run]


class Store(NamedTuple):
    """Blocks to copy out, and the number under which the end of it is reported."""

    job: int
    moves: list[Move]


class Load(NamedTuple):
    """Blocks to copy in for a request; without moves it cannot be done, and is reported failed."""

    request_id: str
    moves: list[Move] | None


class Place(NamedTuple):
    """Where a worker's part of a chunk of group `group` lies: its arena, and the page bytes of the
    workers before it.
    """

    arena: ArenaHandle
    bytes_before: int


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """The work of one step, in the order in which it is done."""

    places: dict[tuple[int, int], list[Place]] | None = None
    """By (pipeline rank, tensor rank), once: where to copy to and from."""
    fence: list[int] = field(default_factory=list)
    """Stores whose blocks were freed: over before anything else is written."""
    early: list[Store] = field(default_factory=list)
    """Stores of freed blocks that nobody has begun: done before anything else is written."""
    stores: list[Store] = field(default_factory=list)
    """Stores of blocks that this step fills: begun when it has."""
    loads: list[Load] = field(default_factory=list)
    void: list[str] = field(default_factory=list)
    """Requests whose loads under way brought what is no longer true: reported failed."""


@dataclass
class Registered(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A worker's pages: bytes of a page by group and plane, what names their layout, and where the
    worker is.
    """

    page_bytes: list[tuple[int, ...]]
    fields: dict[str, str]
    machine: str
    pid: int
    rank: tuple[int, int]
    direct: Any = None
    """The worker itself, for a scheduler in the same process."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"direct": None}


class Loaded(NamedTuple):
    """An adapter that a worker loaded, and a digest of its files; None if they could not be read,
    or changed meanwhile.
    """

    rank: tuple[int, int]
    number: int
    name: tuple[str, str]
    digest: bytes | None


@dataclass
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Stores that are over, by the number of workers that say so, and those that failed. What was
    loaded before counts first.
    """

    over: Counter[int]
    failed: set[int]
    loaded: list[Loaded] = field(default_factory=list)
    registered: dict[tuple[int, int], Registered] = field(default_factory=dict)
    """With a worker's first report: beside other connectors vLLM hands on one handshake only."""

    def aggregate(self, other: Report) -> Report:
        return Report(
            self.over + other.over,
            self.failed | other.failed,
            self.loaded + other.loaded,
            self.registered | other.registered,
        )
