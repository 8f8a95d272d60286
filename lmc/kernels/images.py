"""The compiled objects beside this file, images to a driver, and which of them serves a GPU.

objects/manifest.json (written by ci/native.py) lists them. An image is used for the architecture it
names, PTX for every NVIDIA GPU from compute capability 8.0 on that has none of its own. Bytes that
are not those of the manifest, and images for other GPUs, are refused by name.
"""

import functools
import hashlib
import json
import re
import struct
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Image", "ImageError", "Vendor", "check", "choose", "listed", "load", "manifest"]

OBJECTS = Path(__file__).with_name("objects")
PTX = "compute_80"
_PTX_SINCE = 80

_EM_CUDA, _EM_AMDGPU = 190, 224
_AMD_MACHINES = {
    0x3F: "gfx90a",
    0x4C: "gfx942",
    0x4F: "gfx950",
    0x41: "gfx1100",
    0x4E: "gfx1201",
}


class Vendor(StrEnum):
    CUDA = "cuda"
    HIP = "hip"


class ImageError(ValueError):
    """No image serves this GPU, or these bytes are not the image they should be."""


class Image(NamedTuple):
    """A row of the manifest."""

    arch: str
    vendor: Vendor
    file: str
    sha256: str


class Manifest(NamedTuple):
    """What ci/native.py wrote; `source` is the hash of the device code."""

    source: str
    objects: dict[str, dict[str, Any]]


def manifest() -> Manifest:
    """Raises ImageError where nothing was built."""
    try:
        found = json.loads((OBJECTS / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImageError(f"no GPU objects were built: {error.filename} is missing") from None
    return Manifest(found["source"], found["objects"])


@functools.cache
def listed() -> dict[str, Image]:
    """By architecture: sm_90, compute_80, gfx942."""
    return {
        arch: Image(arch, Vendor(row["vendor"]), row["file"], row["sha256"])
        for arch, row in manifest().objects.items()
    }


def choose(vendor: Vendor, arch: str) -> Image:
    """The image for a GPU that calls itself `arch`: sm_90, or gfx942:sramecc+:xnack-."""
    known = listed()
    exact = known.get(arch.partition(":")[0])
    if exact and exact.vendor is vendor:
        return exact
    capability = re.fullmatch(r"sm_(\d+)a?", arch)
    if vendor is Vendor.CUDA and capability and int(capability[1]) >= _PTX_SINCE:
        return known[PTX]
    served = ", ".join(image.arch for image in known.values() if image.vendor is vendor)
    raise ImageError(f"no {vendor} image for {arch}, there are {served}")


def load(image: Image) -> bytes:
    """The bytes of an image, checked."""
    data = (OBJECTS / image.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise ImageError(f"{image.file} is not the file that was built: reinstall lmc")
    check(data, image.vendor, image.arch)
    return data


def check(data: bytes, vendor: Vendor, arch: str) -> None:
    """Refuse an image that is not for `arch`, before a driver sees it."""
    found = describe(data)
    if found != f"{vendor} {arch}":
        raise ImageError(f"an image for {vendor} {arch} is wanted, this one is for {found}")


def describe(data: bytes) -> str:
    """What an image is for, by its own header: "cuda sm_90"."""
    if target := re.search(rb"^\.target sm_(\d+)", data, re.MULTILINE):
        return f"{Vendor.CUDA} compute_{target[1].decode()}"
    if data[:4] != b"\x7fELF" or len(data) < 52:
        return "no GPU"
    (machine,), (flags,) = struct.unpack_from("<H", data, 18), struct.unpack_from("<I", data, 48)
    if machine == _EM_CUDA:  # ABI 8 moved the architecture up by a byte
        return f"{Vendor.CUDA} sm_{flags >> (8 if data[8] >= 8 else 0) & 0xFF}"
    if machine == _EM_AMDGPU:
        return f"{Vendor.HIP} {_AMD_MACHINES.get(flags & 0xFF, hex(flags & 0xFF))}"
    return f"ELF machine {machine}"
