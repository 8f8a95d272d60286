"""Builds lmc from a clean copy of this checkout."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from ci import native

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command whose Python sees nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LMC_"))}
    environment |= variables
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean_copy(target: Path) -> Path:
    """What a clone of this working tree would hold: no built library, no caches."""
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build_flags() -> list[str]:
    try:
        native.check_compilers()
    except SystemExit:
        return []
    return ["--no-build-isolation"] if find_spec("setuptools") else []
