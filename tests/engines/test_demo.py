"""What the demo and its scripts say when something is wrong, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ci import demo
from ci.demo_engines import Engine, Sglang, Vllm
from tests.engines import models
from tests.engines.server import Answer, ServerError, check_port
from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_server import VllmServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engines.server import Server

ROOT = Path(__file__).resolve().parents[2]


def answer(output_ids: tuple[int, ...], cached_tokens: int) -> Answer:
    return Answer(2000, cached_tokens, output_ids, (), "", 1.0)


@pytest.fixture(params=[Sglang(64), Vllm(128)], ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


@pytest.fixture(params=[SglangServer, VllmServer])
def launch(request: pytest.FixtureRequest) -> Callable[..., Server]:
    start: Callable[..., Server] = request.param
    return start


def results(**cached: int) -> demo.Results:
    """Two variants, one answer a run; `off=5` means 5 cached tokens in that run."""
    filled = demo.Results()
    for name in demo.NAMES:
        for variant in range(2):
            default = 1984 if name in demo.HITS else 0
            filled.add(name, variant, answer((7, variant), cached.get(name, default)))
    return filled


def finished(engine: Engine, of: demo.Results) -> demo.Demo:
    shown = object.__new__(demo.Demo)
    shown.engine, shown.results, shown.prompts = engine, of, [[0] * 2000] * 2
    shown.chat = [{"prompt_tokens": n, "cached_tokens": n - 70} for n in (2000, 2080, 2200)]
    return shown


def bash(script: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/ci/env.sh; {script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_demo_as_promised_passes(engine: Engine) -> None:
    finished(engine, results()).check()


@pytest.mark.parametrize(
    ("name", "cached"), [("cold", 1), ("off", 64), ("after_flush", 1743), ("after_restart", 0)]
)
def test_a_run_with_the_wrong_number_of_cached_tokens_is_named(
    engine: Engine, name: str, cached: int
) -> None:
    with pytest.raises(demo.DemoError, match=f"{name}: {cached} tokens"):
        finished(engine, results(**{name: cached})).check()


def test_one_differing_token_is_an_error(engine: Engine) -> None:
    differing = results()
    differing.answers["after_restart"][1] = [answer((7, 9), 1984)]
    with pytest.raises(demo.DemoError, match="differ"):
        finished(engine, differing).check()


def test_a_chat_that_forgets_is_an_error(engine: Engine) -> None:
    forgetful = finished(engine, results())
    forgetful.chat[2]["cached_tokens"] = 1984
    with pytest.raises(demo.DemoError, match=r"chat: 1984 tokens.* all 2048"):
        forgetful.check()


def test_a_shorter_prompt_keeps_its_beginning_and_the_question(tmp_path: Path) -> None:
    words = pytest.importorskip("tokenizers")
    by_word = words.Tokenizer(words.models.WordLevel({"?": 0}, unk_token="?"))
    by_word.pre_tokenizer = words.pre_tokenizers.Whitespace()
    by_word.train_from_iterator([demo.DOCUMENT.read_text(), demo.QUESTION, demo.system_text(0)])
    by_word.save(str(tmp_path / "tokenizer.json"))
    (whole,), (short,) = (demo.prompts(tmp_path, 1, length) for length in (None, 200))
    assert len(whole) > len(short) == 200
    assert short[:100] == whole[:100]
    assert demo.QUESTION.removesuffix("?") in by_word.decode(short)


def test_little_disk_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(demo.DemoError, match=r"0\.9 GB of free disk.*--out"):
        demo.prepare(tmp_path / "out")


def test_a_port_in_use_is_said_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} .*--port"):
            check_port(port)


def test_a_file_with_another_sha256_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"something else")
    with pytest.raises(models.ModelError, match=r"sha256 .* expected b179c9.*pip cache purge"):
        models.check_sha256(file, models.SMOLLM2_SHA256)


def test_an_unknown_model_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="tiny-llama"):
        models.model("large-llama", tmp_path)


def test_a_half_made_model_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path) -> None:
        out.mkdir()
        raise models.ModelError("no network")

    monkeypatch.setitem(models.MAKERS, "tiny-llama", fail)
    with pytest.raises(models.ModelError, match="no network"):
        models.model("tiny-llama", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_a_server_that_dies_shows_the_end_of_its_log(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    died = launch(
        tmp_path, tmp_path / "log", launch=("-c", "print('out of luck'); raise SystemExit(3)")
    )
    with pytest.raises(ServerError, match=r"exit code 3[\s\S]*out of luck"), died:
        pass


def test_nothing_is_left_running_when_the_demo_is_interrupted(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    child = tmp_path / "child"
    script = (
        "import subprocess, time\n"
        "p = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(child)!r}, 'w').write(f'{{p.pid}} ')\n"
        "time.sleep(1000)"
    )
    server = launch(tmp_path, tmp_path / "log", launch=("-c", script))
    while not (child.exists() and child.read_text().endswith(" ")):
        time.sleep(0.01)
    server.__exit__(KeyboardInterrupt, None, None)
    deadline = time.monotonic() + 10
    while running(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(int(child.read_text()))
    assert server.process.returncode is not None


def running(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe") != ""
    except OSError:  # gone, or a zombie
        return False


def test_missing_tools_are_named_with_the_command() -> None:
    done = bash("PATH=; install_tools g++ ninja-build")
    assert done.returncode == 1
    assert "this machine lacks: g++ ninja-build" in done.stderr
    assert "apt-get install -y --no-install-recommends g++ ninja-build" in done.stderr


def test_an_old_python_is_refused() -> None:
    done = bash("PYTHON=/bin/false; find_python")
    assert done.returncode == 1
    assert "not a Python of at least 3.11" in done.stderr


def test_a_full_disk_is_said_before_an_installation() -> None:
    done = bash("need_disk / 1000000")
    assert done.returncode == 1
    assert "1000000 are needed" in done.stderr


@pytest.mark.parametrize(
    ("said", "understood"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==2.13.0", "could not be downloaded"),
        ("Temporary failure in name resolution", "could not be downloaded"),
        ("something else", "the installation failed"),
    ],
)
def test_pips_failures_are_explained(tmp_path: Path, said: str, understood: str) -> None:
    log = tmp_path / "pip.log"
    log.write_text(said)
    done = bash(f"explain {log}")
    assert done.returncode == 1
    assert understood in done.stderr
