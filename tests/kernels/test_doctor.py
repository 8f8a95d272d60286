"""`doctor --kernels` shows what was proved, and names what is broken without breaking itself."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmc import cpu
from lmc.__main__ import main
from lmc.cli import kernels, try_kernels
from lmc.kernels import Vendor, images, listed, manifest, proof
from lmc.transfer.reference import TorchBackend

from .executors import ROOT
from .fake import VENDORS, Fake

CPU = torch.device("cpu")

WRONG = """
import json, sys
from lmc.cli import try_kernels
from lmc.transfer.reference import TorchBackend

class Wrong(TorchBackend):
    def gather(self, transfer, planes):
        super().gather(transfer, planes[:-1])

def resolve(name, device):
    try_kernels.logging.getLogger("lmc").info("lmc transfer backend: wrong (for a test)")
    return Wrong()

try_kernels.resolve = resolve
print(json.dumps(try_kernels.tried(try_kernels.torch.device("cpu"))))
"""
REFUSED = """
import sys
from lmc.cli import try_kernels
from tests.kernels.fake import Fake, Path, Vendor

fake = Fake(Vendor(sys.argv[1]), Path(sys.argv[2]))
backend = fake.backend()
fake.set("fail_launch", 1)
try_kernels.moved(backend, try_kernels.SHAPES["odd rows"], try_kernels.torch.device("cpu"))
"""
NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from lmc.__main__ import main
sys.exit(main(["doctor", "--kernels"]))
"""


def child(script: str, *words: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}",
        *words,
    ]


# --- the command


def test_here_all_is_whole_and_the_cpu_moves_its_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kernels"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"NVIDIA sm_90 +ISA-checked \d+ / \d+, compiled 1 / 1\n", said)
    assert all(f"ok   object    {arch}" in said for arch in listed())
    takes = manifest().objects["sm_90"]["kernels"]["lmc_gather"]
    assert f"gather {takes['registers']} registers, {takes['spills']} spills" in said
    assert "cpu, this machine: cpu (the pool is on cpu); executed on this CPU: " in said
    assert said.endswith("\nhealthy\n")


def test_json_has_the_rows_the_objects_and_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kernels", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    figures = {name: [] for name in ("proof", "object", "device")}
    for finding in report["findings"]:
        figures[finding["name"]].append(finding["figures"])
    assert report["healthy"] is True
    rows = proof.rows_of(proof.read(), manifest().source)
    assert figures["proof"][0]["rows"] == [row._asdict() for row in rows]
    assert {row["arch"]: row["sha256"] for row in figures["object"]} == {
        arch: image.sha256 for arch, image in listed().items()
    }
    assert (figures["device"][0]["backend"], figures["device"][0]["differ"]) == ("cpu", [])


def test_without_torch_it_says_so_and_looks_at_the_objects() -> None:
    done = subprocess.run(child(NO_TORCH), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "note torch     torch is not installed" in done.stdout
    assert "ok   object    gfx942" in done.stdout
    assert "device" not in done.stdout


# --- proof and objects


def test_proof_of_other_device_code_is_no_proof_of_this() -> None:
    (found,) = kernels.check_proof("other")
    assert found.state == "note"
    assert "of other device code than this: tests/kernels/test_images.py" in found.text
    assert found.figures["rows"] == []


def test_a_damaged_and_a_missing_object_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(images.OBJECTS, tmp_path / "objects")
    monkeypatch.setattr(images, "OBJECTS", tmp_path / "objects")
    (tmp_path / "objects" / "sm_90.cubin").write_bytes(b"cut off")
    (tmp_path / "objects" / "gfx942.hsaco").unlink()
    bad = [found.text for found in kernels.check_objects() if found.state == "bad"]
    assert len(bad) == 2
    assert "sm_90: sm_90.cubin is not the file that was built" in bad[0]
    assert "gfx942: [Errno 2] No such file" in bad[1]


def test_without_objects_and_library_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "OBJECTS", tmp_path)
    monkeypatch.setattr(cpu, "missing", lambda: "no native library: gone")
    monkeypatch.setattr(kernels, "check_devices", lambda: iter(()))
    objects, native = kernels.examine_kernels()
    assert (objects.name, objects.state) == ("objects", "bad")
    assert "no GPU objects were built" in objects.text
    assert (native.state, native.text) == ("note", "no native library: gone")


# --- devices


@pytest.mark.parametrize("way", ["pageable", "reach", "stage"])
@pytest.mark.parametrize("shape", try_kernels.SHAPES)
@pytest.mark.parametrize("vendor", VENDORS)
def test_what_is_tried_on_a_gpu_moves_its_bytes_on_a_fake_one(
    vendor: Vendor, shape: str, way: str, libraries: dict[Vendor, Path]
) -> None:
    fake = Fake(vendor, libraries[vendor])
    backend, tried = fake.backend(), try_kernels.SHAPES[shape]
    got = try_kernels.moved(backend, tried, CPU, way)
    assert all(map(torch.equal, got, try_kernels.moved(TorchBackend(), tried, CPU)))
    backend.close()
    assert fake.left == 0


def test_wrong_bytes_are_a_finding() -> None:
    found = kernels.check_device("cpu", child(WRONG))
    assert found.state == "bad"
    assert (
        "wrong (for a test): wrong bytes in pages of 64 tokens, K and V (pageable); " in found.text
    )


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_driver_that_refuses_is_a_finding_in_its_own_words(
    vendor: Vendor, libraries: dict[Vendor, Path]
) -> None:
    command = child(REFUSED, vendor, str(libraries[vendor]))
    found = kernels.check_device("cuda:0", command)
    call = {Vendor.CUDA: "cuLaunchKernel", Vendor.HIP: "hipModuleLaunchKernel"}[vendor]
    assert (found.name, found.state) == ("device", "bad")
    assert f"DriverError: {call}: " in found.text
    assert found.text.startswith("cuda:0: ")
    assert found.text.endswith("(exit status 1)")


def test_a_driver_that_crashes_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = child("import os; os.kill(os.getpid(), 11)")
    found = kernels.check_device("cuda:0", crash)
    assert found.text == "cuda:0: it said nothing (killed by SIGSEGV)"
    monkeypatch.setattr(kernels, "TRY_TIMEOUT_S", 0.1)
    hang = kernels.check_device("cuda:0", child("import time; time.sleep(30)"))
    assert (hang.state, hang.text) == ("bad", "cuda:0: no answer within 0 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_finding_in_torchs_words() -> None:
    found = kernels.check_device("cuda:0")
    assert found.state == "bad"
    assert "(exit status 1)" in found.text
