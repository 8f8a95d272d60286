"""Settings: every default, every bad value refused by name with its choices."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lmc.config import Config, TierUrl, free_ram_bytes
from lmc.tiers import open_tiers
from lmc.tiers.disk import DiskTier


def test_defaults() -> None:
    config = Config.from_env({})
    assert config == Config()
    assert dataclasses.asdict(config) == {
        "enable": None,
        "ram_bytes": None,
        "tiers": (),
        "chunk_tokens": 256,
        "salt": "",
        "model_version": "",
        "stage_wait_s": 0.5,
        "io_threads": 4,
        "write_queue_bytes": 10**9,
        "kernels": "auto",
        "gpu_copy": "auto",
        "gpu_blocks": None,
        "unknown": (),
    }


def test_all_settings_are_read() -> None:
    config = Config.from_env(
        {
            "LMC_ENABLE": "1",
            "LMC_RAM_GB": "1.5",
            "LMC_TIERS": "file:///a?gb=2, file:///b",
            "LMC_CHUNK_TOKENS": "512",
            "LMC_SALT": "pepper",
            "LMC_MODEL_VERSION": "2026-11",
            "LMC_STAGE_WAIT_MS": "20",
            "LMC_IO_THREADS": "2",
            "LMC_WRITE_QUEUE_MB": "0.5",
            "LMC_KERNELS": "torch",
            "LMC_GPU_COPY": "stage",
            "LMC_GPU_BLOCKS": "32",
            "HOME": "/",
        }
    )
    tiers = (TierUrl("file", "", "/a", {"gb": "2"}), TierUrl("file", "", "/b", {}))
    expected = Config(
        True,
        1_500_000_000,
        tiers,
        512,
        "pepper",
        "2026-11",
        0.02,
        2,
        500_000,
        "torch",
        "stage",
        32,
    )
    assert config == expected
    config.refuse_unknown()


def test_every_setting_has_a_documented_field() -> None:
    text = Path(__file__).parents[2].joinpath("lmc/config.py").read_text()
    settings = set(re.findall(r'^    "(LMC_\w+)": \(', text, re.MULTILINE))
    documented = set(re.findall(r'"""(LMC_\w+):', text))
    assert len(settings) == 12
    assert settings == documented


def test_empty_value_is_the_default() -> None:
    names = ["LMC_ENABLE", "LMC_RAM_GB", "LMC_TIERS", "LMC_CHUNK_TOKENS", "LMC_KERNELS"]
    assert Config.from_env(dict.fromkeys(names, "")) == Config()


@pytest.mark.parametrize("text", ["1", "true", "on", "yes", "TRUE", "On"])
def test_ways_to_say_yes(text: str) -> None:
    assert Config.from_env({"LMC_ENABLE": text}).enable


@pytest.mark.parametrize("text", ["0", "false", "off", "No"])
def test_ways_to_say_no(text: str) -> None:
    assert not Config.from_env({"LMC_ENABLE": text}).enable


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("LMC_ENABLE", "maybe", "choices: 1, true, on, yes, 0, false, off, no"),
        ("LMC_RAM_GB", "lots", "must be a number from 0.001 to 1e+06 GB"),
        ("LMC_RAM_GB", "0", "must be a number from 0.001 to 1e+06 GB"),
        ("LMC_RAM_GB", "-1", "must be a number from 0.001 to 1e+06 GB"),
        ("LMC_RAM_GB", "nan", "must be a number from 0.001 to 1e+06 GB"),
        ("LMC_RAM_GB", "inf", "must be a number from 0.001 to 1e+06 GB"),
        ("LMC_CHUNK_TOKENS", "63", "must be a whole number from 64 to 65536 tokens"),
        ("LMC_CHUNK_TOKENS", "256.5", "must be a whole number from 64 to 65536 tokens"),
        ("LMC_CHUNK_TOKENS", "1e3", "must be a whole number from 64 to 65536 tokens"),
        ("LMC_STAGE_WAIT_MS", "-1", "must be a number from 0 to 60000 ms"),
        ("LMC_STAGE_WAIT_MS", "soon", "must be a number from 0 to 60000 ms"),
        ("LMC_IO_THREADS", "0", "must be a whole number from 1 to 256"),
        ("LMC_IO_THREADS", "1000", "must be a whole number from 1 to 256"),
        ("LMC_WRITE_QUEUE_MB", "-0.1", "must be a number from 0 to 1e+06 MB"),
        ("LMC_KERNELS", "cuda12", "choices: auto, cpu, cuda, hip, triton, torch"),
        ("LMC_GPU_COPY", "fast", "choices: auto, reach, batch, stage"),
        ("LMC_GPU_BLOCKS", "0", "must be a whole number from 1 to 65535"),
        ("LMC_TIERS", "/plain/path", "has no known scheme; choices: file://"),
        ("LMC_TIERS", "ftp://host/x", "has no known scheme; choices: file://"),
        ("LMC_TIERS", "file:///a,", "'' has no known scheme"),
        ("LMC_TIERS", "file://[/a", "is not a URL"),
        ("LMC_TIERS", "file:///a#1?gb=2", "write # in a path as %23, a comma as %2C"),
    ],
)
def test_bad_value_names_the_setting_and_its_choices(name: str, value: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        Config.from_env({name: value})
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("LMC_RAM", "LMC_RAM_GB"),
        ("LMC_RAM_MB", "LMC_RAM_GB"),
        ("LMC_TIER", "LMC_TIERS"),
        ("LMC_CHUNK_SIZE", "LMC_CHUNK_TOKENS"),
        ("LMC_IO_THREAD", "LMC_IO_THREADS"),
        ("LMC_ENABLED", "LMC_ENABLE"),
        ("LMC_", "LMC_"),
    ],
)
def test_unknown_setting_names_the_nearest(wrong: str, nearest: str) -> None:
    config = Config.from_env({wrong: "1", "OTHER": "1"})
    assert config.unknown == (wrong,)
    with pytest.raises(ValueError, match=f"{wrong} is not a setting.*did you mean {nearest}"):
        config.refuse_unknown()


def test_unknown_setting_does_no_harm_while_lmc_is_off() -> None:
    assert Config.from_env({"LMC_NOPE": "1"}) == dataclasses.replace(
        Config(), unknown=("LMC_NOPE",)
    )


# --- tiers


def test_paths_may_be_quoted() -> None:
    assert TierUrl.parse("file:///a%2Cb%23c%20d?gb=1").path == "/a,b#c d"


def test_tiers_are_opened_in_order(tmp_path: Path) -> None:
    text = f"file://{tmp_path}/fast?gb=0.5,file://{tmp_path}/slow"
    tiers = open_tiers(Config.from_env({"LMC_TIERS": text}))
    assert [type(tier) for tier in tiers] == [DiskTier, DiskTier]
    assert (tmp_path / "fast" / "chunks").is_dir()
    assert (tmp_path / "slow" / "chunks").is_dir()
    for tier in tiers:
        tier.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file://host/path", r"LMC_TIERS: file://host/path: needs an absolute path"),
        ("file:relative", r"needs an absolute path"),
        ("file://", r"needs an absolute path"),
        ("file:///x?gb=0", r"the only option is gb=SIZE, a number from 0.001 to 1e\+06 GB"),
        ("file:///x?gb=-5", r"the only option is gb=SIZE"),
        ("file:///x?gb=nan", r"the only option is gb=SIZE"),
        ("file:///x?gb=inf", r"the only option is gb=SIZE"),
        ("file:///x?gb=", r"the only option is gb=SIZE"),
        ("file:///x?gb=big", r"the only option is gb=SIZE"),
        ("file:///x?size=5", r"the only option is gb=SIZE"),
        ("file:///x?gb=1,file:///x?gb=2", r"LMC_TIERS: names file:///x more than once"),
        ("file:///dev/null/x", r"LMC_TIERS: file:///dev/null/x: cannot be used: .*Not a directory"),
    ],
)
def test_tier_that_cannot_be_opened_says_why(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_tiers(Config.from_env({"LMC_TIERS": url}))


# --- memory


def test_ranks_share_the_memory_of_the_machine() -> None:
    assert Config(ram_bytes=10**9).ram_bytes_of_rank(4) == 250_000_000
    assert Config().ram_bytes_of_rank(8) < Config().ram_bytes_of_rank(1) + 10**9


def test_default_is_a_quarter_of_what_is_free() -> None:
    quarter = free_ram_bytes() / 4
    assert Config().ram_bytes_of_rank(1) == pytest.approx(quarter, rel=0.2)


class _Machine:
    """Files of a machine with 100 MB free."""

    def __init__(self, folder: Path) -> None:
        self.cgroup, self.meminfo, self.groups = folder / "cg", folder / "mem", folder / "self"
        self.meminfo.write_text("MemTotal: 999 kB\nMemAvailable:   100000 kB\n")
        self.groups.write_text("0::/\n")

    def write(self, folder: str, **files: str) -> None:
        place = self.cgroup / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name.replace("__", ".")).write_text(text + "\n")

    def free(self) -> int:
        return free_ram_bytes(self.cgroup, self.meminfo, self.groups)


def test_without_cgroups_the_machine_is_the_limit(tmp_path: Path) -> None:
    machine = _Machine(tmp_path)
    assert machine.free() == 102_400_000
    machine.groups.unlink()
    assert machine.free() == 102_400_000


def test_file_cache_in_the_cgroup_counts_as_free(tmp_path: Path) -> None:
    machine = _Machine(tmp_path)
    machine.write(
        "",
        memory__max="50000000",
        memory__current="49000000",
        memory__stat="anon 9000000\ninactive_file 30000000\nactive_file 10000000",
    )
    assert machine.free() == 41_000_000


@pytest.mark.parametrize("limit", ["max", "500000000"])
def test_cgroup_with_more_than_the_machine(tmp_path: Path, limit: str) -> None:
    machine = _Machine(tmp_path)
    stat = "inactive_file 0\nactive_file 0"
    machine.write("", memory__max=limit, memory__current="0", memory__stat=stat)
    assert machine.free() == 102_400_000


def test_limits_of_all_groups_above_count(tmp_path: Path) -> None:
    machine = _Machine(tmp_path)
    stat = "inactive_file 0\nactive_file 0"
    machine.groups.write_text("0::/pod/app\n")
    machine.write("pod/app", memory__max="max", memory__current="1", memory__stat=stat)
    machine.write("pod", memory__max="3000", memory__current="1000", memory__stat=stat)
    assert machine.free() == 2000
    machine.write("pod/app", memory__max="100", memory__current="1000")
    assert machine.free() == 0


def test_cgroups_of_the_first_version(tmp_path: Path) -> None:
    machine = _Machine(tmp_path)
    machine.groups.write_text("9:cpu,memory:/job\n1:name=systemd:/\n0::/\n")
    machine.write(
        "memory/job",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="1000",
        memory__stat="inactive_file 1\nactive_file 1\ntotal_inactive_file 20\ntotal_active_file 3",
    )
    assert machine.free() == 4023


@pytest.mark.parametrize(("text", "asked"), [("1", True), ("0", False), ("", None), (None, None)])
def test_whether_lmc_is_asked_for_is_read_alone(text, asked):
    env = {"LMC_RAM_GB": "plenty"} | ({} if text is None else {"LMC_ENABLE": text})
    assert Config.asks_for_lmc(env) is asked
