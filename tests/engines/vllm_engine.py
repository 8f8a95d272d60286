"""A real vLLM `LLM` in a process of its own, asked over its standard input and output.

    with VllmEngine(model, log, LMC_TIERS=f"file://{folder}") as engine:
        cold = engine.ask([prompt])[0]

So an engine has its own environment, ends like a user's script ends, and leaves an exit code.
`python vllm_engine.py` is the other end: a line with the options of `LLM`, then one line a call.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

STOP_S = 60.0
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The default pins all threads to one of two cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    # The tests send functions to the workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "seed": 1,
    "max_num_seqs": 4,
    "max_model_len": 2304,
    "kv_cache_memory_bytes": 1 << 28,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
}
LMC = {"kv_offloading_backend": "lmc", "kv_offloading_size": 0.5}


class EngineError(Exception):
    """The engine did not do what was asked; the text says what happened."""


@dataclass(frozen=True, slots=True)
class Answer:
    cached_tokens: int
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ttft_s: float


class VllmEngine:
    """`options` go to `LLM`, upper-case ones to the environment; lmc is on unless `lmc=False`. The
    log's folder is also the engine's own, for whatever it writes.
    """

    def __init__(self, model: Path, log: Path, *, lmc: bool = True, **options: Any) -> None:
        environment = {name: options.pop(name) for name in list(options) if name.isupper()}
        compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        environment |= {"TMPDIR": str(log.parent), "TORCHINDUCTOR_CACHE_DIR": compiled}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LMC_")}
        self.options = {"model": str(model), **OPTIONS, **(LMC if lmc else {}), **options}
        self.log = log
        self.config: dict[str, Any] = {}
        self.survivors: list[str] = []
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=kept | ENVIRONMENT | environment,
                cwd=log.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self.config = self.call("start", **self.options)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        elif (code := self.stop()) != 0:
            raise EngineError(f"the engine left exit code {code}; {self.log_tail()}")

    def stop(self) -> int:
        """The script's end, as a user's: nothing is asked of the engine but to go."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            code = self.process.wait(STOP_S)
            self.survivors = survivors_of(self.process.pid)
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        """What is left of the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def call(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"the engine died at {name}; {self.log_tail()}")
        return json.loads(line)

    def ask(
        self, prompts: Sequence[Sequence[int]], num_tokens: int = 8, **options: Any
    ) -> list[Answer]:
        """Greedy, all at once; `cold` ones look for nothing, in no cache."""
        given = {"prompts": [list(prompt) for prompt in prompts], "num_tokens": num_tokens}
        return [
            Answer(found["cached"], tuple(found["ids"]), tuple(found["logprobs"]), found["ttft_s"])
            for found in self.call("ask", **given, **options)
        ]

    def flush(self, *, connector: bool = False) -> None:
        """Empties vLLM's own cache; with `connector` what lmc keeps is not found again either."""
        assert self.call("flush", connector=connector)

    def counters(self) -> dict[str, float]:
        """What lmc counted, and `preemptions`; only with VLLM_ENABLE_V1_MULTIPROCESSING=0 is it
        within reach.
        """
        found: dict[str, float] = self.call("counters")
        return found

    def log_tail(self, num_lines: int = 40) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-num_lines:]
        return f"the end of its log, {self.log}:\n  " + "\n  ".join(lines)


def survivors_of(session: int) -> list[str]:
    """What still runs in a session some seconds later."""
    deadline = time.monotonic() + 5.0
    while (found := list(commands_of(session))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def commands_of(session: int) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (process / "stat").read_text().rpartition(")")[2].split()
            if int(status[3]) == session and status[0] != "Z":
                yield (process / "cmdline").read_text().replace("\0", " ")


# --- the other end


class Calls:
    def start(self, **options: Any) -> dict[str, Any]:
        from vllm import LLM

        self.llm = LLM(**options)
        config = self.llm.llm_engine.vllm_config
        transfer = config.kv_transfer_config
        self.ask([[5, 6, 7] * 20], 2)  # first times of everything; too short to be kept
        return {
            "connector": transfer and transfer.kv_connector,
            "block_tokens": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
        }

    def ask(
        self,
        prompts: list[list[int]],
        num_tokens: int,
        salt: str | None = None,
        adapter: tuple[str, int, str] | None = None,
        cold: bool = False,
    ) -> list[dict[str, Any]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        greedy = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            skip_reading_prefix_cache=cold,
        )
        salted = {"cache_salt": salt} if salt else {}
        found = self.llm.generate(
            [{"prompt_token_ids": prompt, **salted} for prompt in prompts],
            greedy,
            use_tqdm=False,
            lora_request=LoRARequest(*adapter) if adapter else None,
        )
        return [self.answer(request) for request in found]

    def answer(self, request: Any) -> dict[str, Any]:
        (output,) = request.outputs
        taken = zip(output.token_ids, output.logprobs, strict=True)
        return {
            "cached": request.num_cached_tokens,
            "ids": list(output.token_ids),
            "logprobs": [found[token].logprob for token, found in taken],
            "ttft_s": request.metrics.first_token_latency,
            "reason": output.finish_reason,
        }

    def flush(self, connector: bool) -> bool:
        for _ in range(100):  # blocks of a request that is just over may still be held
            if self.llm.reset_prefix_cache(reset_connector=connector):
                return True
            time.sleep(0.05)
        return False

    def counters(self) -> dict[str, float]:
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        (preemptions,) = (m for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")
        return scheduler.connector.scheduler.snapshot() | {"preemptions": preemptions.value}

    def fail_loads(self, number: int) -> None:
        """The next `number` copies into each worker's KV cache write nothing and fail."""
        self.llm.collective_rpc(fail_loads, args=(number,))

    def threads(self) -> list[str]:
        return self.llm.collective_rpc(threads)[0] + threads(None)


def fail_loads(worker: Any, number: int) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    copier = get_kv_transfer_group().worker._copier
    copier._backend = Broken(copier._backend, number)


class Broken:
    """Copies that leave garbage where they should have written, and fail."""

    def __init__(self, backend: Any, number: int) -> None:
        self.backend, self.left = backend, number

    def gather(self, transfer: Any, planes: range) -> None:
        self.backend.gather(transfer, planes)

    def scatter(self, transfer: Any, planes: range) -> None:
        if self.left == 0:
            return self.backend.scatter(transfer, planes)
        self.left -= 1
        for plane in planes:
            transfer.pool.planes[plane][transfer.page_ids] = 63
        raise OSError("broken on purpose")


def threads(worker: Any) -> list[str]:
    tasks = Path("/proc/self/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()]


for function in (fail_loads, threads):
    function.lmc_leaves_weights = True  # else nothing kept before they are called is found again


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no reply
    calls = Calls()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(calls, name)(**arguments)), file=replies, flush=True)


if __name__ == "__main__":
    main()
