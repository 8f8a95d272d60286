"""The doctor names what is wrong, stops at nothing, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmc import cpu
from lmc.__main__ import main
from lmc.cli import doctor, machine, try_tier
from lmc.config import _SETTINGS, Config
from lmc.testing import MemoryTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lmc import Name, Tier
    from lmc.cli.finding import Finding

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_SOCKETS = """
import sys
def refuse(event, _):
    assert not event.startswith("socket."), event
sys.addaudithook(refuse)
from lmc.__main__ import main
sys.exit(main(["doctor"]))
"""


ENGINES = (doctor.SGLANG, doctor.VLLM)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, no engine (asking one takes half a minute), memory enough, huge pages."""
    for var in [var for var in os.environ if var.startswith("LMC_")]:
        monkeypatch.delenv(var)
    engines = {package for engine in ENGINES for package in engine.packages}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in engines else real(name))
    monkeypatch.setattr(doctor, "HUGE_PAGES", Path("/dev/null"))


def findings(**env: str) -> list[Finding]:
    return list(doctor.examine(env))


def bad(**env: str) -> list[str]:
    return [finding.text for finding in findings(**env) if finding.state == "bad"]


def tiers(url: str, monkeypatch: pytest.MonkeyPatch, tier: Tier) -> list[Finding]:
    """What is found of this tier in place of a real one."""
    monkeypatch.setattr(try_tier, "open_tiers", lambda config: [tier])
    return list(try_tier.check_tiers(Config.from_env({"LMC_TIERS": url})))


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- the command


def test_a_plain_machine_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\nhealthy\n")


def test_a_bad_setting_makes_it_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMC_KERNELS", "magic")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "LMC_KERNELS='magic': choices: auto, cpu, cuda, hip, triton, torch" in said
    assert said.endswith("\nto be mended: settings\n")


def test_json_says_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMC_TIERS", f"file://{tmp_path}?gb=0.1")
    assert main(["doctor", "--json", "--ranks", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["versions"]["lmc"] == "0.1.0"
    by_name = {finding["name"]: finding for finding in reversed(report["findings"])}
    assert by_name["tier"]["figures"]["write_gbps"] > 0
    ram = by_name["ram"]["figures"]
    assert ram["rank_bytes"] == ram["total_bytes"] // 2


@pytest.mark.skipif(find_spec("sglang") is not None, reason="what SGLang does is its own affair")
def test_it_opens_no_socket() -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", WITHOUT_SOCKETS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "lmc 0.1.0" in done.stdout
    assert not done.stderr


# --- settings and memory


def test_every_setting_is_shown_with_its_value_or_default() -> None:
    (settings,) = (f for f in findings(LMC_RAM_GB="0.5") if f.name == "settings")
    assert set(settings.figures) == set(_SETTINGS)
    assert settings.figures["LMC_RAM_GB"] == "0.5"
    assert settings.figures["LMC_STAGE_WAIT_MS"] == "500 (default)"
    assert settings.figures["LMC_WRITE_QUEUE_MB"] == "1000 (default)"
    assert all(f"{var} " in settings.text for var in _SETTINGS)


def test_each_bad_setting_is_named_and_the_others_count() -> None:
    env = {"LMC_RAMGB": "3", "LMC_IO_THREADS": "many", "LMC_STAGE_WAIT_MS": "7", "OTHER": "x"}
    found, config = doctor.check_settings(env)
    said = [finding.text for finding in found if finding.state == "bad"]
    assert len(said) == 2
    assert "did you mean LMC_RAM_GB?" in said[0]
    assert "LMC_IO_THREADS='many': must be a whole number" in said[1]
    assert config.stage_wait_s == 0.007


@pytest.mark.parametrize(("tokens", "fits"), [("80", True), ("4096", True), ("100", False)])
def test_a_chunk_size_that_goes_with_no_page_is_named(tokens: str, fits: bool) -> None:
    said = bad(LMC_CHUNK_TOKENS=tokens)
    assert said == [] if fits else f"LMC_CHUNK_TOKENS={tokens}" in said[0]


def test_secrets_are_not_shown() -> None:
    assert doctor.shown("LMC_SALT", "hush") == "(set)"
    assert doctor.shown("LMC_TIERS", "file://me:hush@host/x") == "file://***@host/x"


def test_more_ram_than_there_is_is_named() -> None:
    (said,) = bad(LMC_RAM_GB="1000000")
    assert "lmc may take 1000000.00 GB" in said


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (4, 0))
    assert doctor.check_python().todo == "lmc takes Python 4.0 or newer"


# --- tiers


def test_a_tier_leaves_no_trace(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder"
    found = list(try_tier.check_tiers(Config.from_env({"LMC_TIERS": f"file://{place}?gb=0.1"})))
    assert [finding.state for finding in found] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_tier_in_use_stays_as_it_is(tmp_path: Path) -> None:
    chunk = tmp_path / "chunks" / "ab" / ("ab" * 32)
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(bytes(8192))
    (tmp_path / "aside").mkdir()
    before = everything_in(tmp_path)
    assert bad(LMC_TIERS=f"file://{tmp_path}?gb=0.1") == []
    assert everything_in(tmp_path) == before


def test_each_tier_is_tried_and_each_bad_one_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    good, wrong = f"file://{tmp_path}/good?gb=0.1", f"file://{tmp_path}/file"
    found = findings(LMC_TIERS=f"{good},{wrong},{good}")
    assert [f.state for f in found if f.name == "tier"] == ["ok", "ok", "bad", "ok", "ok", "bad"]
    said = [f.text for f in found if f.state == "bad"]
    assert f"file://{tmp_path}/file: cannot be used" in said[0]
    assert "twice" in said[1]


def test_a_bound_below_one_chunk_and_one_above_the_disk_are_named(tmp_path: Path) -> None:
    (said,) = bad(LMC_TIERS=f"file://{tmp_path}?gb=0.001")
    assert "a chunk of 4 MiB was not kept" in said
    (said,) = bad(LMC_TIERS=f"file://{tmp_path}?gb=1000000")
    assert "up to 1e+06 GB allowed" in said


def test_the_default_bound_is_the_one_of_the_tier(tmp_path: Path) -> None:
    found = findings(LMC_TIERS=f"file://{tmp_path}")
    allowed = [f.figures["allowed_gb"] for f in found if "allowed_gb" in f.figures]
    (tier,) = try_tier.open_tiers(Config.from_env({"LMC_TIERS": f"file://{tmp_path}"}))
    assert allowed == [tier._capacity / 1e9]  # type: ignore[attr-defined]
    tier.close()


def test_bytes_that_come_back_wrong_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flipping(MemoryTier):
        def read(self, name: Name, into: memoryview) -> int:
            size = super().read(name, into)
            into[5000] ^= 1
            return size

    (said,) = tiers(f"file://{tmp_path}", monkeypatch, Flipping())
    assert (said.state, said.text) == ("bad", f"file://{tmp_path}: came back damaged (checksum)")


def test_a_tier_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(MemoryTier):
        def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
            raise OSError(28, "No space left on device")

    (said,) = tiers(f"file://{tmp_path}", monkeypatch, Full())
    assert said.state == "bad"
    assert "No space left on device" in said.text


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_tier_that_hangs_does_not_hang_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    class Hanging(MemoryTier):
        def write(self, name: Name, blob: memoryview, shorter: Sequence[Name] = ()) -> None:
            release.wait(30)

    monkeypatch.setattr(try_tier, "TIMEOUT_S", 0.2)
    (said,) = tiers(f"file://{tmp_path}", monkeypatch, Hanging())
    assert (said.state, "no answer within" in said.text) == ("bad", True)


# --- native library, engine, compiler


def test_without_the_native_library_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "no native library: gone")
    assert doctor.check_native(Config()).state == "note"
    assert doctor.check_native(Config(kernels="cpu")).state == "bad"


@pytest.fixture
def fake_adapter(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An environment whose adapters' `compat` is what a test says."""

    def make(compat: str) -> dict[str, str]:
        for engine in ENGINES:
            package = tmp_path / engine.adapter
            package.mkdir()
            check = "import os; assert os.environ['LMC_ENABLE'] == '0'"
            (package / "__init__.py").write_text(check)
            (package / "compat.py").write_text(compat)
        return {"PYTHONPATH": str(tmp_path), "LMC_ENABLE": "1"}

    return make


@pytest.mark.parametrize(
    ("compat", "state", "text"),
    [
        ("TESTED = ('1.0',)\ndef check(): pass", "ok", "1.0, tested"),
        ("TESTED = ('0.9',)\ndef check(): pass", "note", "tested is 0.9"),
        ("def check(): raise RuntimeError('match is gone')", "bad", "RuntimeError: match is gone"),
        ("def check(): raise SystemExit(3)", "bad", "exit code 3"),
    ],
)
def test_what_the_adapter_says_of_its_engine(
    fake_adapter: Callable[[str], dict[str, str]], compat: str, state: str, text: str
) -> None:
    env = fake_adapter(compat)
    for engine in ENGINES:
        found = doctor.check_compat(engine, "1.0+cpu", env)
        assert (found.name, found.state) == (engine.name, state)
        assert text in found.text.replace("1.0+cpu", "1.0")


def test_a_missing_compiler_is_named() -> None:
    found = doctor.check_page_hash({"CXX": "no-such-compiler -O2"})
    assert found.state == "bad"
    assert "no-such-compiler" in found.text
    assert "apt-get install" in found.todo


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("fatal error: openssl/sha.h: No such file", "OpenSSL's headers"),
        ("fatal error: Python.h: No such file", "Python's headers"),
        ("ld: cannot find -lcrypto", "OpenSSL"),
        ("cc1plus: out of memory", "a working"),
    ],
)
def test_what_the_compiler_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: str
) -> None:
    for tool, script in {"cxx": f"echo '{words}' >&2; exit 1", "ninja": "exit 0"}.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = doctor.check_page_hash({"CXX": str(tmp_path / "cxx")})
    assert found.state == "bad"
    assert f"lacks: {named}" in found.text


@pytest.mark.engine
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_the_real_engine_is_as_lmc_knows_it(engine: doctor.Engine) -> None:
    pytest.importorskip(engine.name)
    env = {name: value for name, value in os.environ.items() if not name.startswith("LMC_")}
    packages = filter(None, map(machine.installed, engine.packages))
    version = next(packages)
    assert doctor.check_compat(engine, version, env).state == "ok"
    assert doctor.check_entry_point(engine).state == "ok"
    if engine is doctor.SGLANG:
        assert doctor.check_page_hash(env).state == "ok"
