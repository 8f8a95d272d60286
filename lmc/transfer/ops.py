"""The two ops, gather (pool -> chunks) and scatter (chunks -> pool), and the choice of backend:
in memory of the host the native library, on a GPU the kernels that ship, or else those that Triton
compiles; torch's index ops where nothing else works.

A transfer is checked once, whichever backend moves it. The memory behind a piece's address is the
caller's, and stays valid and unshared until the op returns. Gather may repeat page ids, scatter
wants them distinct.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from lmc.config import KERNELS
from lmc.kernels import ImageError, compile_pages
from lmc.kernels.driver import DriverError
from lmc.transfer.gpu import GpuBackend
from lmc.transfer.native import CpuBackend
from lmc.transfer.pages import PagedPool, Piece, Transfer
from lmc.transfer.reference import TorchBackend

__all__ = ["Backend", "gather", "resolve", "scatter"]

log = logging.getLogger("lmc")


class Backend(Protocol):
    """What moves bytes. `planes` is a range with step 1 inside the pool."""

    name: str

    def gather(self, transfer: Transfer, planes: range) -> None: ...
    def scatter(self, transfer: Transfer, planes: range) -> None: ...


def gather(
    pool: PagedPool,
    page_ids: torch.Tensor,
    pieces: Sequence[Piece],
    planes: range | None = None,
    *,
    backend: Backend,
) -> None:
    """Copy pages of the pool into chunks."""
    backend.gather(Transfer(pool, page_ids, pieces), _plane_range(pool, planes))


def scatter(
    pool: PagedPool,
    page_ids: torch.Tensor,
    pieces: Sequence[Piece],
    planes: range | None = None,
    *,
    backend: Backend,
) -> None:
    """Copy pages of chunks into the pool."""
    backend.scatter(Transfer(pool, page_ids, pieces), _plane_range(pool, planes))


def resolve(
    name: str, device: torch.device, *, copy: str = "auto", blocks: int | None = None
) -> Backend:
    """The backend for a pool on `device`: the fastest that works here, or the one named. On a GPU
    it copies as its vendor's policy says, or by the way and with as many blocks as are given
    (`Policy.forced`). Raises ValueError for what is not served.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernels {name!r}, choose from {', '.join(KERNELS)}")
    if name == "torch":
        return _chosen(TorchBackend(), "asked for")
    refusals: list[str] = []
    for make in _CHOICES.get(name, (_shipped,)):
        try:
            backend = make(device, copy, blocks)
        except (ImageError, DriverError, OSError) as error:
            refusals.append(str(error))
            continue
        if name == "auto":
            return _chosen(backend, "; ".join(refusals) or f"the pool is on {device}")
        if name == backend.name:
            return _chosen(backend, "asked for")
        refusals.append(f"the pool is on {device}")
    why = "; ".join(dict.fromkeys(refusals))
    if name != "auto":
        raise ValueError(f"kernels {name!r} cannot serve this pool: {why}")
    return _chosen(TorchBackend(), why)


def _shipped(device: torch.device, copy: str, blocks: int | None) -> Backend:
    return CpuBackend() if device.type == "cpu" else _gpu(GpuBackend.of(device), copy, blocks)


def _triton(device: torch.device, copy: str, blocks: int | None) -> Backend:
    return _gpu(GpuBackend.of(device, compile_pages), copy, blocks)


def _gpu(backend: GpuBackend, copy: str, blocks: int | None) -> GpuBackend:
    backend.policy = backend.policy.forced(copy, blocks)
    return backend


_CHOICES = {"auto": (_shipped, _triton), "triton": (_triton,)}
"""In order; the other names are names of what ships."""


def _chosen(backend: Backend, reason: str) -> Backend:
    log.info("lmc transfer backend: %s (%s)", backend.name, reason)
    return backend


def _plane_range(pool: PagedPool, planes: range | None) -> range:
    everything = range(len(pool.planes))
    if planes is None:
        return everything
    if planes.step != 1 or planes.start < 0 or planes.stop > len(everything):
        raise ValueError(f"{planes} lies outside the planes {everything}")
    return range(planes.start, max(planes.start, planes.stop))
