"""vLLM's engine core with lmc's connector, in this process, without weights.

EngineCore, scheduler, block pools, KV cache groups, layouts and the connector's calls are vLLM's
own; only the executor is ours. Its "model" writes, for each token it is given, bytes that are a
function of all tokens so far, the layer, the worker and the head, and checks each byte its
attention would read against that function: what is wrong, stale or missing shows in the step that
would use it. The next token is a hash of the tokens so far, so answers are known beforehand.

    engine = Engine(Options(folder), full(4))  # one worker, four layers
    engine.run([prompt(1, 300)])               # arrives, is scheduled, answers; all checked
    engine.close()
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.engine import core as engine_core
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache, copy_kv_cache_blocks_inplace

import lmc_vllm.connector
from tests.integrations.vllm.adapters import Loras
from tests.integrations.vllm.fake import Context, Layer, answer, next_token, seed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from lmc_vllm.scheduler import SchedulerSide

LAYOUTS = [layout.name for layout in KVCacheLayout]

# --- options


@dataclass(frozen=True)
class Options:
    """What an engine is started with, apart from its layers."""

    model: Path
    layout: str = "LBHNC"
    blocks: int = 200
    block: int = 16
    kernel_block: int | None = None
    """Tokens of the kernel's blocks, if it splits vLLM's."""
    tp: int = 1
    pp: int = 1
    budget: int = 2048
    seqs: int = 16
    max_len: int = 2048
    caching: bool = True
    overlap: bool = False
    """vLLM's asynchronous scheduling: a step is planned before the last one is over."""
    late: str = "no"
    """Which workers run a step only when its result is asked for: no, all, last stage."""
    connector: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's."""
    mamba_mode: str | None = None
    configure: Callable[[Any], object] | None = None
    """Changes vLLM's configuration once it stands."""
    loras: bool = False
    gpu: Any = None
    """A GPU whose memory is the processor's: lmc copies by it, the model runs in its stream."""

    def vllm_config(self) -> Any:
        transfer = KVTransferConfig(
            kv_connector="LMCConnector",
            kv_connector_module_path="lmc_vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config=dict(self.extra),
        )
        config = EngineArgs(
            **{
                "model": str(self.model),
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "enforce_eager": True,
                "max_model_len": self.max_len,
                "block_size": self.block,
                "max_num_seqs": self.seqs,
                "max_num_batched_tokens": self.budget,
                "enable_prefix_caching": self.caching,
                "tensor_parallel_size": self.tp,
                "pipeline_parallel_size": self.pp,
                "num_gpu_blocks_override": self.blocks,
                "async_scheduling": self.overlap,
                "kv_transfer_config": transfer if self.connector else None,
                "enable_lora": self.loras,
                **self.arguments,
            }
        ).create_engine_config()
        config.cache_config.block_size = self.block
        # vLLM's CPU platform switches it off; the scheduler it stands for knows no platform
        config.scheduler_config.async_scheduling = self.overlap and self.pp == 1
        if self.mamba_mode:
            config.cache_config.mamba_cache_mode = self.mamba_mode
        if self.configure:
            self.configure(config)
        return config


# --- workers


class Worker:
    """One worker: its connector, its KV cache and the requests it knows."""

    def __init__(
        self, engine: Engine, vllm_config: Any, number: int, rank: tuple[int, int]
    ) -> None:
        self.engine, self.vllm_config, self.number, self.rank = engine, vllm_config, number, rank
        self.contexts: dict[str, Context] = {}
        self.layers: list[Layer] = []
        self.connector: Any = None
        self.loras = Loras(vllm_config) if engine.options.loras else None
        self.queue: deque[tuple[int, SchedulerOutput]] = deque()
        self.done: dict[int, ModelRunnerOutput] = {}

    def initialize(self, config: KVCacheConfig, layout: KVCacheLayout) -> None:
        options = self.engine.options
        if options.connector:
            self.connector = KVConnectorFactory.create_connector(
                self.vllm_config, KVConnectorRole.WORKER, config
            )
        kernel = [
            options.kernel_block or group.kv_cache_spec.block_size
            if isinstance(group.kv_cache_spec, kv.AttentionSpec)
            else group.kv_cache_spec.block_size
            for group in config.kv_cache_groups
        ]
        self.caches = allocate_kv_cache(config, torch.device("cpu"), layout, kernel)
        self.num_blocks = config.num_blocks
        who = self.rank[1] // config.kv_tp_replicas
        for number, group in enumerate(config.kv_cache_groups):
            for name in group.layer_names:
                spec = group.kv_cache_spec
                spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
                layer = Layer(name, spec, number, self.caches[name], config.num_blocks, who)
                self.layers.append(layer)
        if self.connector is not None:
            with self.engine.as_worker(self):
                self.connector.register_kv_caches(self.engine.shared_layers(self.caches))

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        with self.engine.as_worker(self):
            if self.connector is not None:
                self.connector.handle_preemptions(output.kv_connector_metadata)
            self._update(output)
            if not output.total_num_scheduled_tokens and self.connector is not None:
                return KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.vllm_config)
            if self.connector is None:
                return self._forward(output)
            with (
                set_forward_context(None, self.vllm_config),
                KVConnectorModelRunnerMixin._get_kv_connector_output(output) as found,
            ):
                result = self._forward(output)
            result.kv_connector_output = found
            return result

    def _update(self, output: SchedulerOutput) -> None:
        if self.engine.options.gpu is not None:
            self.engine.options.gpu.finish()  # what the model's stream was told to wait for
        for request_id in output.finished_req_ids:
            self.contexts.pop(request_id, None)
        copies = output.kv_cache_block_copies
        if copies:
            copy_kv_cache_blocks_inplace(list(self.caches.values()), self.num_blocks, copies)
        for new in output.scheduled_new_reqs:
            media = tuple(
                (f.mm_position.offset, f.mm_position.length, seed_of(f.identifier))
                for f in new.mm_features
            )
            self.contexts[new.req_id] = Context(
                list(new.prompt_token_ids),
                [list(ids) for ids in new.block_ids],
                self.engine.seed(),
                media,
            )
        cached = output.scheduled_cached_reqs
        for request_id, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            context = self.contexts[request_id]
            if request_id in cached.resumed_req_ids:
                context.tokens = list(cached.all_token_ids[request_id])
                context.blocks = [list(more) for more in ids]
                context.seed, context.chain = self.engine.seed(), []
            elif ids is not None:
                for mine, more in zip(context.blocks, ids, strict=True):
                    mine.extend(more)

    def _activate(self, request_ids: Iterable[str]) -> None:
        """As vLLM's model runners do before a forward."""
        loras = {name: lora for name in request_ids if (lora := self.engine.lora[name])}
        if loras:
            self.loras.set_active_adapters(set(loras.values()), None)
        for name, lora in loras.items():
            seed = self.engine.seed(self.loras.files(lora.lora_int_id))
            self.contexts[name].seed = seed
            self.engine.seeds[name].add(seed)

    def add_lora(self, lora: Any) -> bool:
        return self.loras.add_adapter(lora)

    def _forward(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self._activate(output.num_scheduled_tokens)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        work = [
            (request_id, self.contexts[request_id], computed[request_id], computed[request_id] + n)
            for request_id, n in output.num_scheduled_tokens.items()
        ]
        if self.engine.moves_bytes:
            self._compute(work)
        sampled = []
        for request_id, context, start, end in work:
            if self.number == 0:
                self.engine.computed[request_id] += end - start
            said = []
            if end >= len(context.tokens):
                context.numbers(end)
                said = [next_token(context.chain[end - 1])]
                context.tokens = context.tokens[:end] + said
            sampled.append(said)
        ids = [request_id for request_id, *_ in work]
        return ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled)

    def _compute(self, work: Sequence[tuple[str, Context, int, int]]) -> None:
        for layer in self.layers:
            if layer.is_state:
                for request_id, context, start, _ in work:
                    layer.check_state(context, start, request_id)
                for _, context, start, end in work:
                    layer.write_state(context, start, end)
            else:
                for _, context, start, end in work:
                    layer.write(context, start, end)
                for request_id, context, start, end in work:
                    if request_id not in self.engine.mixed:
                        layer.check(context, start, end, request_id)


class _Late(Future):
    """The result of a step that workers may not have run yet."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def result(self, timeout: float | None = None) -> Any:
        return self._run()


class _Executor(Executor):
    """Workers in this process, one after the other; each in step order, none waits for another."""

    supports_pp = True
    engine: Engine  # set by the class the engine makes

    def _init_executor(self) -> None:
        options = self.engine.options
        self.steps = 0
        self.asked = 0
        self.workers = self.engine.workers = [
            Worker(self.engine, self.vllm_config, stage * options.tp + rank, (stage, rank))
            for stage in range(options.pp)
            for rank in range(options.tp)
        ]

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        specs, stages = list(self.engine.specs.items()), self.engine.options.pp
        share = -(-len(specs) // stages)
        return [dict(specs[w.rank[0] * share : (w.rank[0] + 1) * share]) for w in self.workers]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [[self.engine.options.layout] for _ in self.workers]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        self.layout = KVCacheLayout[layout_name]

    def determine_available_memory(self) -> list[int]:
        return [1 << 34 for _ in self.workers]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        for worker, config in zip(self.workers, kv_cache_configs, strict=True):
            worker.initialize(config, self.layout)

    def compile_or_warm_up_model(self) -> None:
        pass

    def get_kv_connector_handshake_metadata(self) -> list[Any]:
        found = []
        for worker in self.workers:
            told = worker.connector.get_handshake_metadata()
            if len(self.workers) > 1:  # as from processes of their own
                told = replace(
                    pickle.loads(pickle.dumps(told)), pid=os.getpid() + 1 + worker.number
                )
            found.append({worker.rank: told})
        return found

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        number, late = self.steps, self.engine.options.late
        self.steps += 1
        for worker in self.workers:
            sent = scheduler_output
            if len(self.workers) > 1:
                sent = pickle.loads(pickle.dumps(scheduler_output))
            worker.queue.append((number, sent))
            if late == "no" or (late == "last stage" and not worker.rank[0]):
                self._drain(worker, number)
        self.last = number
        if scheduler_output.total_num_scheduled_tokens:
            return _Late(lambda: None) if non_block else None
        future = _Late(lambda: self._output(number))
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        number = self.last
        future = _Late(lambda: self._output(number))
        return future if non_block else future.result()

    def _drain(self, worker: Worker, number: int) -> None:
        while worker.queue and worker.queue[0][0] <= number:
            step, output = worker.queue.popleft()
            worker.done[step] = worker.execute(output)

    def _output(self, number: int) -> ModelRunnerOutput:
        for worker in self.workers:
            self._drain(worker, number)
        outputs = [worker.done.pop(number) for worker in self.workers]
        if len(outputs) == 1 or self.kv_output_aggregator is None:
            return outputs[-1]
        outputs = [pickle.loads(pickle.dumps(output)) for output in outputs]  # as above
        return self.kv_output_aggregator.aggregate(outputs, len(outputs) - 1)

    def collective_rpc(
        self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None, **_: Any
    ) -> list[Any]:
        """A function is called with each worker; a method no worker has does nothing."""
        said = []
        for worker in self.workers:
            call = method if callable(method) else getattr(type(worker), method, None)
            with self.engine.as_worker(worker):
                said.append(call(worker, *args, **(kwargs or {})) if call else None)
        return said

    def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        for worker in self.workers:
            if worker.connector is not None:
                worker.connector.shutdown()


class Copies:
    """lmc's transfer backend with gates: closed, copies wait; and with failures on demand."""

    def __init__(self, backend: Any) -> None:
        self.name, self._backend = backend.name, backend
        self.may_store, self.may_load = threading.Event(), threading.Event()
        self.may_store.set()
        self.may_load.set()
        self.failing_stores = self.failing_loads = 0
        self.stored = self.loaded = 0

    def gather(self, transfer: Any, planes: range) -> None:
        assert self.may_store.wait(30), "a store nobody let go on"
        if self.failing_stores:
            self.failing_stores -= 1
            raise OSError("injected into a store")
        self._backend.gather(transfer, planes)
        self.stored += len(transfer.page_ids)

    def scatter(self, transfer: Any, planes: range) -> None:
        assert self.may_load.wait(30), "a load nobody let go on"
        if self.failing_loads:
            self.failing_loads -= 1
            raise OSError("injected into a load")
        self._backend.scatter(transfer, planes)
        self.loaded += len(transfer.page_ids)


class SlowStores:
    """Stores that only go on while somebody waits for each, and at the `end`: the slowest copies
    there can be. `fenced` of them were waited for.
    """

    def __init__(self, engine: Engine) -> None:
        self._gates: list[tuple[threading.Event, Any]] = []
        self.fenced = 0
        self.ended = False
        for worker in engine.workers:
            self._slow_down(worker.connector.worker._copier)

    def _slow_down(self, copier: Any) -> None:
        gates: dict[int, threading.Event] = {}
        store, run, fence = copier.store, copier._store, copier.fence

        def slowly(transfers: Any, engine_over: Any) -> None:
            assert gates[id(transfers)].wait(60), "a store nobody waited for"
            run(transfers, engine_over)

        def begin(transfers: Any, **how: bool) -> Any:
            transfers, gate = tuple(transfers), threading.Event()
            gates[id(transfers)] = gate
            self._gates.append((gate, transfers))
            if self.ended:
                gate.set()
            job = store(transfers, **how)
            job.gate = gate
            return job

        def wait(jobs: Any) -> None:
            for job in jobs:
                self.fenced += not job.done()
                job.gate.set()
            fence(jobs)

        copier.store, copier._store, copier.fence = begin, slowly, wait

    def let_go(self) -> None:
        """Those that were begun go on."""
        for gate, _ in self._gates:
            gate.set()

    def end(self) -> None:
        """So do all that will be."""
        self.ended = True
        self.let_go()


# --- the engine


class Engine:
    """vLLM's engine core over `specs`, stepped by hand."""

    moves_bytes = True
    """Whether the model writes and checks KV at all: a bench measures lmc, not numpy."""

    def __init__(
        self, options: Options, specs: dict[str, Any], shares: dict[str, str] | None = None
    ):
        self.options, self.specs, self.shares = options, specs, shares or {}
        self.weights = 0
        self.rank = (0, 0)
        self.workers: list[Worker] = []
        self.copies: list[Copies] = []
        self.computed: Counter[str] = Counter()
        self.lora: dict[str, Any] = {}
        self.seeds: dict[str, set[int]] = {}
        """Of the adapters that requests were computed with."""
        self.mixed: set[str] = set()
        """Requests that vLLM itself computes on blocks of another adapter."""
        self.said: dict[str, list[int]] = {}
        self.asked: dict[str, tuple[Request, int]] = {}
        self.broken = True
        self._number = 0
        executor = type("_Workers", (_Executor,), {"engine": self})
        with self._lmc():
            self.core = engine_core.EngineCore(options.vllm_config(), executor, log_stats=False)
        self.broken = False

    @contextmanager
    def _lmc(self) -> Iterator[None]:
        """lmc asks vLLM's process groups for its rank, and copies with what its kernels are."""
        resolve, streams = lmc_vllm.worker.resolve, lmc_vllm.worker.engine_streams

        def gated(*args: Any, **options: Any) -> Any:
            if self.options.gpu is not None:
                return self.options.gpu.backend()
            self.copies.append(Copies(resolve(*args, **options)))
            return self.copies[-1]

        kept = lmc_vllm.connector._rank, engine_core.freeze_gc_heap, engine_core.enable_envs_cache
        lmc_vllm.connector._rank = lambda: self.rank
        lmc_vllm.worker.resolve = gated
        if self.options.gpu is not None:
            lmc_vllm.worker.engine_streams = lambda: [self.options.gpu.stream]
        engine_core.freeze_gc_heap = engine_core.enable_envs_cache = lambda: None
        try:
            yield
        finally:
            lmc_vllm.worker.resolve, lmc_vllm.worker.engine_streams = resolve, streams
            (
                lmc_vllm.connector._rank,
                engine_core.freeze_gc_heap,
                engine_core.enable_envs_cache,
            ) = kept

    @contextmanager
    def as_worker(self, worker: Worker) -> Iterator[None]:
        kept, self.rank = self.rank, worker.rank
        kv_transfer_state._KV_CONNECTOR_AGENT = worker.connector
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT, self.rank = None, kept

    def shared_layers(self, caches: dict[str, Any]) -> dict[str, Any]:
        """vLLM registers layers that use another one's KV as well."""
        return caches | {name: caches[of] for name, of in self.shares.items() if of in caches}

    # --- what tests look at

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def lmc(self) -> SchedulerSide:
        return self.scheduler.connector.scheduler

    def count(self, name: str) -> float:
        return self.lmc.snapshot().get(name, 0)

    def seed(self, adapter: Any = None) -> int:
        """What KV hangs on, apart from tokens: the weights, the adapter's contents."""
        return seed_of(self.weights, adapter)

    # --- requests

    def ask(
        self,
        tokens: Sequence[int],
        answer_tokens: int = 1,
        *,
        salt: str | None = None,
        stop: Sequence[int] = (),
        **more: Any,
    ) -> str:
        """A request arrives; its id. A token of `stop` ends its answer."""
        self._number += 1
        request = Request(
            request_id=f"r{self._number}",
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(
                max_tokens=answer_tokens,
                temperature=0,
                ignore_eos=True,
                stop_token_ids=list(stop),
            ),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self.core.request_block_hasher,
            **more,
        )
        name = request.request_id
        self.asked[name] = request, answer_tokens
        self.lora[name] = request.lora_request
        self.said[name] = []
        self.seeds[name] = set()
        self.core.add_request(request)
        return name

    def abort(self, name: str) -> None:
        self.core.abort_requests([name])

    def status(self, name: str) -> RequestStatus:
        return self.asked[name][0].status

    def step(self) -> bool:
        """One turn of the engine's loop; False if there is nothing to do."""
        if not (self.scheduler.has_requests() or self.core.batch_queue):
            return False
        self.broken = True  # what is raised from here on leaves vLLM in the middle of a step
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        self.broken = False
        for one in (outputs or {}).values():
            for output in one.outputs:
                self.said[output.request_id] += output.new_token_ids
                assert str(output.finish_reason) != "error", f"{output.request_id} ended in error"
        if not executed:
            time.sleep(0.0005)
        return True

    def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        """Steps until `condition()`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.step()

    def finish(self, *names: str) -> None:
        """Steps until these requests are answered, rightly."""
        self.finish_somehow(*names)
        for name in names:
            self.check_answer(name)

    def finish_somehow(self, *names: str) -> None:
        """Steps until these requests are answered, whatever they are told."""
        self.until(lambda: all(self.asked[name][0].is_finished() for name in names))

    def check_answer(self, name: str) -> None:
        request, count = self.asked[name]
        assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED, request.status
        seeds = self.seeds[name] or {self.seed()}
        if not request.mm_features and len(seeds) == 1:
            count = min(count, self.options.max_len - request.num_prompt_tokens)
            right = answer(request.prompt_token_ids, count, *seeds)
            assert self.said[name] == right, f"{name}: wrong answer"

    def settle(self, timeout_s: float = 20.0) -> None:
        """Steps until nothing is under way."""
        deadline = time.monotonic() + timeout_s
        while self.step():
            assert time.monotonic() < deadline, "the engine does not come to rest"
        self.lmc.poll()
        assert all(lane.store.drain(10) for lane in self.lmc.lanes)

    def run(
        self, prompts: Iterable[Sequence[int]], answer_tokens: int = 1, **more: Any
    ) -> list[int]:
        """Requests that arrive together: how many tokens of each prompt had to be computed."""
        names = [self.ask(tokens, answer_tokens, **more) for tokens in prompts]
        self.finish(*names)
        self.settle()
        return [self.computed[name] - (answer_tokens - 1) for name in names]

    def forget(self) -> None:
        """vLLM's own cache becomes empty, and its memory rubbish."""
        assert self.scheduler.reset_prefix_cache()
        for worker in self.workers:
            for layer in worker.layers:
                layer.words[...] = 0xDEAD

    def again(
        self, prompts: Iterable[Sequence[int]], answer_tokens: int = 1, **more: Any
    ) -> list[int]:
        """`run`, of what vLLM itself has forgotten."""
        self.forget()
        return self.run(prompts, answer_tokens, **more)

    # --- the end

    def check(self) -> None:
        """Nothing is held, and every invariant of the stores holds."""
        side = self.lmc
        assert not side._savings, "stores that never ended"
        assert not side._loading, "loads that never ended"
        assert not side._requests, f"requests kept: {side._requests.keys()}"
        assert not side._coming, "loads that others are told to wait for"
        for lane in side.lanes:
            ram = lane.store.ram
            ram.check()
            assert ram.num_free + ram.num_idle == lane.store.arena.num_slots, (
                f"slots held in group {lane.group.id}"
            )
            assert not lane.store._tickets

    def close(self) -> None:
        for copies in self.copies:
            copies.may_store.set()
            copies.may_load.set()
        try:
            if not self.broken and self.options.connector:
                self.settle()
                self.check()
        finally:  # EngineCore.shutdown, without what it does to the process
            self.core.model_executor.shutdown()
            self.scheduler.shutdown()
