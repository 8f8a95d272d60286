"""Several ranks of one engine, a process each: SGLang's own reductions between them, and its own
check that ranks decide alike.

Whoever plays with them gets what every rank tells (rank.py says what is played). A rank that hangs
dumps its threads and dies, and with it the others: nothing here waits without an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.engines.server import die_with_parent, server_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
START_S, GRACE_S = 120.0, 10.0


class RanksFailed(Exception):
    """Ranks diverged, hung or died; the text holds the end of what each said."""


class Ranks:
    """Processes that stay for many plays: `with Ranks(folder) as ranks: ranks.play("requests")`."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self._logs = [folder / f"rank{rank}.log" for rank in range(size)]
        environment = server_environment(
            {
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
                "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
            }
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        script = Path(__file__).with_name("rank.py")
        for rank, log in enumerate(self._logs):
            with log.open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), str(rank), str(size), str(folder)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=environment,
                        preexec_fn=die_with_parent,
                    )
                )

    def __enter__(self) -> Self:
        self._answers(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def play(
        self,
        name: str,
        settings: Sequence[Mapping[str, str]],
        *,
        limit_s: float,
        ranks: Mapping[str, object] | None = None,
        **arguments: object,
    ) -> list[dict[str, Any]]:
        """What each rank tells of play `name` with its own settings; `ranks` says how they are laid
        out. Raises RanksFailed.
        """
        for process, own in zip(self._processes, settings, strict=True):
            order = {"play": name, "settings": own, "limit_s": limit_s, "ranks": ranks or {}}
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # that it is dead shows below
                process.stdin.write(json.dumps(order | {"arguments": arguments}).encode() + b"\n")
                process.stdin.flush()
        return self._answers(limit_s + GRACE_S)

    def _answers(self, limit_s: float) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        dead = False  # one of them: the others have a moment to say why, too
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map() and (ready := selector.select(GRACE_S if dead else limit_s)):
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if line:
                        answers[key.data] = json.loads(line)
                    else:
                        dead = True
        if len(answers) < len(self._processes):
            self._kill()
            silent = set(range(len(self._processes))) - answers.keys()
            raise RanksFailed("\n".join(map(self._end_of_log, sorted(silent))))
        return [answers[rank] for rank in range(len(self._processes))]

    def _end_of_log(self, rank: int) -> str:
        lines = self._logs[rank].read_text(errors="replace").splitlines()[-60:]
        return f"rank {rank} did not answer; the end of its log:\n    " + "\n    ".join(lines)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
