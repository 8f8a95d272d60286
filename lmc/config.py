"""Settings. The only place that reads the environment; every field has a default that works.

A bad value is an error at start that names the setting and what it may be. Once lmc is enabled, an
LMC_* variable that nobody knows is an error too, naming the nearest one: a misspelt setting must
not be a silent default.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from .layout import MIN_CHUNK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

KERNELS = ("auto", "cpu", "cuda", "hip", "triton", "torch")
GPU_COPIES = ("auto", "reach", "batch", "stage")
SCHEMES = ("file",)
_GB = 10**9


@dataclass(frozen=True, slots=True)
class TierUrl:
    """One entry of LMC_TIERS: `scheme://host/path?option=value`."""

    scheme: str
    host: str
    path: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> TierUrl:
        try:
            parts = urlsplit(text.strip())
        except ValueError as error:
            raise ValueError(f"LMC_TIERS: {text!r} is not a URL: {error}") from error
        if parts.scheme not in SCHEMES:
            raise ValueError(
                f"LMC_TIERS: {text!r} has no known scheme; choices: {', '.join(SCHEMES)}://"
            )
        if parts.fragment:
            raise ValueError(f"LMC_TIERS: {text!r}: write # in a path as %23, a comma as %2C")
        return cls(
            parts.scheme,
            parts.netloc,
            unquote(parts.path),
            dict(parse_qsl(parts.query, keep_blank_values=True)),
        )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, read once. `Config()` is the default; `Config.from_env()` what the user asked
    for.
    """

    enable: bool | None = None
    """LMC_ENABLE: switch lmc on in an engine that finds it by entry point (an import switches it on
    as well).
    """
    ram_bytes: int | None = None
    """LMC_RAM_GB: host memory for chunks per machine, in GB (1e9 bytes), shared out among ranks.
    Default: 25 % of what is free when the engine's pool stands."""
    tiers: tuple[TierUrl, ...] = ()
    """LMC_TIERS: places below RAM, in order, separated by commas: `file:///nvme/lmc?gb=200`."""
    chunk_tokens: int = 256
    """LMC_CHUNK_TOKENS: tokens a chunk; a multiple of the engine's page, at least 64."""
    salt: str = ""
    """LMC_SALT: chunks are shared only between processes with the same salt."""
    model_version: str = ""
    """LMC_MODEL_VERSION: name of the weights, where the model's path does not tell (or tells too
    much).
    """
    stage_wait_s: float = 0.5
    """LMC_STAGE_WAIT_MS: longest that a request waits for the next of its chunks on their way up;
    others go on meanwhile.
    """
    io_threads: int = 4
    """LMC_IO_THREADS: threads a tier."""
    write_queue_bytes: int = _GB
    """LMC_WRITE_QUEUE_MB: chunks waiting for a tier, in MB (1e6 bytes); what does not fit is
    dropped and counted.
    """
    kernels: str = "auto"
    """LMC_KERNELS: who moves pages: auto, cpu (native), cuda and hip (kernels), triton, torch."""
    gpu_copy: str = "auto"
    """LMC_GPU_COPY: how a GPU moves pages to and from pinned memory: auto (the vendor's policy),
    reach (a kernel reads and writes it), batch (copy engines, NVIDIA only), stage (by way of the
    GPU's own memory).
    """
    gpu_blocks: int | None = None
    """LMC_GPU_BLOCKS: blocks of 256 threads that a copy takes on a GPU. Default: the policy's."""
    unknown: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read LMC_*. Raises ValueError that names the setting and its choices."""
        values = {
            name: read(env[var])
            for var, (name, read) in _SETTINGS.items()
            if env.get(var, "") != ""
        }
        unknown = tuple(
            sorted(var for var in env if var.startswith("LMC_") and var not in _SETTINGS)
        )
        return cls(**values, unknown=unknown)  # type: ignore[arg-type]

    @staticmethod
    def asks_for_lmc(env: Mapping[str, str] = os.environ) -> bool | None:
        """What LMC_ENABLE says, if anything; where lmc is off the other settings are not read."""
        return _flag(text) if (text := env.get("LMC_ENABLE", "")) else None

    def refuse_unknown(self) -> None:
        """Raise ValueError if the environment has LMC_* names that mean nothing."""
        for var in self.unknown:
            near = difflib.get_close_matches(var, _SETTINGS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{var} is not a setting of lmc; did you mean {near}? All: {', '.join(_SETTINGS)}"
            )

    def ram_bytes_of_rank(self, num_ranks: int) -> int:
        """This rank's share of host memory."""
        total = self.ram_bytes if self.ram_bytes is not None else free_ram_bytes() // 4
        return total // num_ranks


def free_ram_bytes(
    cgroup: Path = Path("/sys/fs/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
    groups: Path = Path("/proc/self/cgroup"),
) -> int:
    """Memory this process may still take: what its cgroups leave, or the machine, whichever is
    less. File cache counts as free: the kernel gives it up first.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, names in _memory_cgroups(cgroup, groups):
        with contextlib.suppress(OSError, ValueError):  # no limit here ("max"), or not a leaf
            limit, used = (int((folder / name).read_text()) for name in names)
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            lists = ("inactive_file", "active_file")
            cached = sum(int(stat.get(f"total_{name}", stat[name])) for name in lists)
            free = min(free, max(0, limit - used + cached))
    return free


def _memory_cgroups(cgroup: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Folders of the memory cgroups this process is in, leaf to root, with the names of their
    limit and use, for both versions of cgroups. Inside a container the leaf may be the root.
    """
    files = {
        "": (cgroup, ("memory.max", "memory.current")),
        "memory": (cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    }
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                if controller in files:
                    root, names = files[controller]
                    leaf = root / path.lstrip("/")
                    for folder in (leaf, *leaf.parents):
                        yield folder, names
                        if folder == root:
                            break


def _number(
    var: str, cast: Callable[[str], float], low: float, high: float, unit: str
) -> Callable[[str], float]:
    kind = "a whole number" if cast is int else "a number"

    def read(text: str) -> float:
        try:
            value = cast(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"{var}={text!r}: must be {kind} from {low:g} to {high:g}{unit}")
        return value

    return read


def _flag(text: str) -> bool:
    choices = {
        "1": True,
        "true": True,
        "on": True,
        "yes": True,
        "0": False,
        "false": False,
        "off": False,
        "no": False,
    }
    if text.lower() not in choices:
        raise ValueError(f"LMC_ENABLE={text!r}: choices: {', '.join(choices)}")
    return choices[text.lower()]


def _one_of(name: str, choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{name}={text!r}: choices: {', '.join(choices)}")
        return text

    return parse


def _chunk_tokens(text: str) -> int:
    return int(_number("LMC_CHUNK_TOKENS", int, MIN_CHUNK_TOKENS, 65536, " tokens")(text))


_gigabytes = _number("LMC_RAM_GB", float, 0.001, 1e6, " GB")
_wait_ms = _number("LMC_STAGE_WAIT_MS", float, 0, 60_000, " ms")
_threads = _number("LMC_IO_THREADS", int, 1, 256, "")
_blocks = _number("LMC_GPU_BLOCKS", int, 1, 65535, "")
_queue_mb = _number("LMC_WRITE_QUEUE_MB", float, 0, 1e6, " MB")

_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "LMC_ENABLE": ("enable", _flag),
    "LMC_RAM_GB": ("ram_bytes", lambda text: int(_gigabytes(text) * _GB)),
    "LMC_TIERS": ("tiers", lambda text: tuple(map(TierUrl.parse, text.split(",")))),
    "LMC_CHUNK_TOKENS": ("chunk_tokens", _chunk_tokens),
    "LMC_SALT": ("salt", str),
    "LMC_MODEL_VERSION": ("model_version", str),
    "LMC_STAGE_WAIT_MS": ("stage_wait_s", lambda text: _wait_ms(text) / 1000),
    "LMC_IO_THREADS": ("io_threads", lambda text: int(_threads(text))),
    "LMC_WRITE_QUEUE_MB": ("write_queue_bytes", lambda text: int(_queue_mb(text) * 10**6)),
    "LMC_KERNELS": ("kernels", _one_of("LMC_KERNELS", KERNELS)),
    "LMC_GPU_COPY": ("gpu_copy", _one_of("LMC_GPU_COPY", GPU_COPIES)),
    "LMC_GPU_BLOCKS": ("gpu_blocks", lambda text: int(_blocks(text))),
}
