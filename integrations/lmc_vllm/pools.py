"""Describes a worker's KV cache to lmc. Blocks are opaque bytes: which runs of memory a block of a
layer is made of follows from the strides alone, so one rule covers every layout of vLLM; whatever
is not made of whole runs is refused, never guessed.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lmc.transfer import PagedPool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .groups import Group

DEVICES = ("cpu", "cuda")  # torch calls AMD's GPUs "cuda" too
SUPPORTED = "KV caches in the memory of the CPU, of NVIDIA's GPUs and of AMD's"


def pools_of(
    groups: Sequence[Group], num_blocks: int, kv_caches: Mapping[str, Any]
) -> list[PagedPool | None]:
    """One pool a group, planes in the order of its layers; None for a group that has no layer in
    this pipeline stage. Raises ValueError naming the layer.
    """
    grouped = {name for group in groups for name in group.layer_names}
    if unknown := sorted(kv_caches.keys() - grouped):
        shared = {_first(kv_caches[name]).data_ptr() for name in grouped & kv_caches.keys()}
        unknown = [n for n in unknown if _first(kv_caches[n]).data_ptr() not in shared]
        if unknown:
            raise ValueError(f"lmc knows no KV cache group of layer {unknown[0]}")
    return [_pool(group, num_blocks, kv_caches) if group.layer_names else None for group in groups]


def _pool(group: Group, num_blocks: int, kv_caches: Mapping[str, Any]) -> PagedPool:
    planes: list[torch.Tensor] = []
    seen: set[int] = set()
    for name in group.layer_names:
        if name not in kv_caches:  # a layer of another pipeline stage
            continue
        found = kv_caches[name]
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if tensor.device.type not in DEVICES:
                raise ValueError(
                    f"lmc does not serve layer {name} on {tensor.device}; supported: {SUPPORTED}"
                )
            for plane in _runs(name, tensor, num_blocks):
                if plane.data_ptr() not in seen:  # layers may share their KV
                    seen.add(plane.data_ptr())
                    planes.append(plane)
    if not planes:
        raise ValueError(f"lmc found no KV cache of layer {group.layer_names[0]}")
    return PagedPool(planes)


def _runs(name: str, tensor: torch.Tensor, num_blocks: int) -> Iterator[torch.Tensor]:
    """The uint8 planes [num_blocks, bytes] of one layer's cache [kernel blocks, ...]."""
    item, ratio = tensor.element_size(), tensor.shape[0] // num_blocks if num_blocks else 0
    if not ratio or tensor.shape[0] != num_blocks * ratio:
        raise ValueError(
            f"layer {name}: {tensor.shape[0]} rows are not whole blocks of {num_blocks}"
        )
    inner = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] > 1]
    run, left = 1, sorted(inner, key=tensor.stride)
    while left and tensor.stride(left[0]) == run:
        run *= tensor.shape[left.pop(0)]
    if ratio > 1:  # the engine's kernel splits a block: its parts are one run, or we do not know
        if left or tensor.stride(0) != run:
            raise ValueError(_unknown(name, tensor))
        run *= ratio
    if run * item < 64 or (left and run < tensor.shape[-1]):
        raise ValueError(_unknown(name, tensor))
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    size, stride = (num_blocks, run * item), (tensor.stride(0) * ratio * item, 1)
    for at in product(*(range(tensor.shape[dim]) for dim in sorted(left))):
        offset = tensor.storage_offset() + sum(
            i * tensor.stride(dim) for i, dim in zip(at, sorted(left), strict=True)
        )
        yield torch.as_strided(storage, size, stride, offset * item)


def _first(cache: Any) -> torch.Tensor:
    first: torch.Tensor = cache[0] if isinstance(cache, (list, tuple)) else cache
    return first


def _unknown(name: str, tensor: torch.Tensor) -> str:
    return (
        f"lmc does not know the layout of layer {name}: shape {tuple(tensor.shape)}, "
        f"strides {tensor.stride()}"
    )
