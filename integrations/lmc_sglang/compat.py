"""All that lmc knows about SGLang's insides: the names it rests on, hooked, wrapped and checked in
one place.

Tested with TESTED. `check` compares what is installed with what is written here and names every
difference, so a new release that moved something is refused at start with a list, not met in the
middle of a request.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

log = logging.getLogger("lmc")

TESTED = ("0.5.23",)

WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"
_WEIGHTS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_REQUEST = "sglang.srt.managers.schedule_batch.Req"
_LORA = "sglang.srt.lora.lora_manager.LoRAManager"
_LORA_COPY = "sglang.srt.lora.mem_pool.LoRAMemoryPool.load_lora_weight_to_buffer"
_LORA_ARGUMENTS = "sglang.srt.arg_groups.lora_hook.check_lora_server_args"
_LORA_CONTROL = "sglang.srt.managers.tokenizer_control_mixin"

EXCLUSIVE_FLAGS = {
    "--enable-unified-memory": "enable_unified_memory",
    "--enable-kv-cache-sharding": "enable_kv_cache_sharding",
}
"""Features that raise beside an external linker: flag -> field of the server arguments."""

LINKER_METHODS = frozenset(
    {
        "lookup",
        "load",
        "start_layer_wise_loading",
        "finish_layer_wise_loading",
        "cancel_queued_load",
        "offload",
        "num_completed_offloads",
        "pop_completed_offload",
        "reset",
        "close",
    }
)

SIGNATURES = {
    f"{WRAPPER}.match": ("self", "key", "req", "result"),
    f"{WRAPPER}._sync_restorable_prefix": (
        *("self", "restorable"),
        *("num_pages", "device_hit_pages"),
    ),
    f"{WRAPPER}._offload_node": ("self", "node_id", "transfers"),
    f"{WRAPPER}.release_request": ("self", "rid"),
    f"{_SCHEDULER}._prefetch_kvcache": ("self", "req", "storage_hit_end"),
    f"{_SCHEDULER}.process_batch_result": ("self", "batch", "result"),
    f"{_ADDER}.add_one_req": ("self", "req", "has_chunked_req", "truncation_align_size"),
    f"{_CACHE}._all_reduce_attn_groups": ("self", "tensor", "op"),
    f"{_STATE}.get_internal_state": ("self", "recv_req"),
    f"{_WEIGHTS}.update_weights_from_disk": None,
    f"{_WEIGHTS}.load_weights_from_distributed": None,
    f"{_WEIGHTS}.update_weights_from_tensor": None,
    f"{_WEIGHTS}.update_weights_from_ipc": None,
    f"{_WEIGHTS}.begin_weight_update": None,
    f"{_WEIGHTS}.end_weight_update": None,
    "sglang.srt.mem_cache.utils.get_storage_hash_str": ("key", "prior_hash", "page_size"),
    f"{_REQUEST}.__init__": None,
    f"{_LORA}.load_lora_adapter": ("self", "lora_ref"),
    f"{_LORA}.load_lora_adapter_from_tensors": (
        *("self", "lora_ref", "tensors"),
        *("config_dict", "added_tokens_config"),
    ),
    f"{_LORA}.unload_lora_adapter": ("self", "lora_ref"),
    f"{_LORA}.create_lora_update_result": ("self", "success", "error_message"),
    _LORA_COPY: (
        *("self", "uid", "buffer_id", "lora_adapter"),
        *("lora_modules", "lora_embed_tokens_module", "lora_lm_head_module"),
    ),
    _LORA_ARGUMENTS: ("server_args",),
    f"{_LORA_CONTROL}.LoRARef": ("lora_id", "lora_name", "lora_path", "pinned"),
}
"""What is hooked or called, with the parameters it must have (None: any)."""

_CACHING = "sglang.srt.mem_cache"
FIELDS = {
    f"{_CACHING}.cache_init_params.CacheInitParams": (
        *("page_size", "is_eagle", "req_to_token_pool", "token_to_kv_pool_allocator"),
        *("tp_cache_group", "attn_tp_cache_group", "pp_size", "attn_cp_size"),
        "swa_retain_window",
        *("sidecar_draft_device_pools", "mtp_draft_device_pools", "mtp_draft_mamba_pools"),
    ),
    f"{_CACHING}.hicache_storage.PoolTransfer": ("name", "keys", "device_indices"),
    f"{_CACHING}.hicache_storage.PoolName": ("KV", "SWA", "MAMBA"),
    f"{_CACHING}.unified_cache.component_type.ComponentType": ("FULL", "SWA", "MAMBA"),
    f"{_CACHING}.unified_cache.unified_tree_core_interface.TreePathNodeInfo": (
        *("node_id", "path_start", "path_end"),
    ),
    f"{_CACHING}.device_pool_info.DevicePoolInfo": ("layer_ids", "buffer_info"),
    f"{_CACHING}.device_pool_info.MHABufferInfo": (
        *("buffers", "scales", "transfer_buffers", "device", "dtype"),
        *("head_num", "head_dim", "v_head_dim"),
    ),
    f"{_CACHING}.device_pool_info.MLABufferInfo": (
        *("buffers", "scales", "native_buffers", "dtype", "layer_indices", "device_layer_num"),
        *("kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "packed_fp8"),
    ),
    f"{_CACHING}.device_pool_info.MambaStateBufferInfo": (
        *("temporal", "conv", "extra_checkpoint_buffers"),
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch": (
        *("forward_mode", "extend_num_tokens", "launch_ts"),
    ),
    "sglang.srt.managers.schedule_batch.ReqKvInfo": (
        *("mamba_pool_idx", "holds_mamba", "mamba_cow_src_index", "mamba_needs_clear"),
    ),
    "sglang.srt.managers.schedule_policy.AddReqResult": ("CONTINUE",),
}
"""Fields of what is read or handed over, by class."""

COUNTER_NAMES = frozenset({"num_layers", "consumer_index", "set_consumer", "wait_until"})
"""What SGLang's pools, runners and workers use of a linker's counter of layers."""

TREE_METHODS = (
    "collect_path_info",
    "get_component_device_value",
    "get_hash_values",
    "prefetch_anchor_info",
)
WEIGHT_CHANGES = tuple(target for target in SIGNATURES if target.startswith(_WEIGHTS))
TENSORS = "__tensor__"
"""The path that SGLang gives to adapters that come as tensors."""

_HICACHE = "sglang.srt.managers.cache_controller.HiCacheController"
_STORAGE = "sglang.srt.mem_cache.hicache_storage.HiCacheStorage"
_HOST_POOLS = "sglang.srt.mem_cache.pool_host"

STORAGE_METHODS = frozenset({"get", "batch_get", "set", "batch_set", "exists"})
HICACHE_SIGNATURES = {
    f"{_HICACHE}.reset": ("self",),
    f"{_HICACHE}._page_get_zero_copy": (
        "self",
        "operation",
        "hash_values",
        "host_indices",
        "extra_info",
    ),
    f"{_HICACHE}._page_set_zero_copy": ("self", "hash_values", "host_indices", "extra_info"),
    f"{_STORAGE}.register_mem_pool_host": ("self", "mem_pool_host"),
    f"{_STORAGE}.register_mem_host_pool_v2": ("self", "host_pool", "host_pool_name"),
    f"{_STORAGE}.on_host_pools_registered": ("self",),
    f"{_STORAGE}.batch_exists": ("self", "keys", "extra_info"),
    f"{_STORAGE}.batch_get_v1": ("self", "keys", "host_indices", "extra_info"),
    f"{_STORAGE}.batch_set_v1": ("self", "keys", "host_indices", "extra_info"),
    f"{_STORAGE}.batch_exists_v2": ("self", "keys", "pool_transfers", "extra_info"),
    f"{_STORAGE}.batch_get_v2": ("self", "transfers", "extra_info"),
    f"{_STORAGE}.batch_set_v2": ("self", "transfers", "extra_info"),
    f"{_HOST_POOLS}.mha.MHATokenToKVPoolHost.get_page_buffer_meta": ("self", "indices"),
    f"{_HOST_POOLS}.mha.AsymmetricMHATokenToKVPoolHost.get_page_buffer_meta": ("self", "indices"),
    f"{_HOST_POOLS}.mla.MLATokenToKVPoolHost.get_page_buffer_meta": ("self", "indices"),
    "sglang.srt.runtime_context.get_server_args": (),
    **{t: SIGNATURES[t] for t in (f"{_STATE}.get_internal_state", *WEIGHT_CHANGES)},
}
"""What the storage of HiCache rests on, as above."""

Declare = Callable[..., None]
Resolver = Callable[[Any, Declare], None]


class AdapterNames(Protocol):
    """Who gives adapters their ids; `None`: SGLang's own."""

    def id_of(self, name: str, path: str) -> str | None: ...


class AdapterListener(Protocol):
    """What becomes of adapters in a scheduler process."""

    def loaded(self, ref: Any) -> str: ...
    def copied(self, lora_id: str | None) -> None: ...
    def apart(self, extra_key: str) -> str: ...


class Keeper(Protocol):
    """What whoever keeps KV wants to hear of."""

    def weights_changed(self) -> None: ...
    def snapshot(self) -> dict[str, float]: ...


class Listener(Keeper, Protocol):
    """What a linker wants to hear of."""

    def match_begins(self, rid: str | None, device_pages: int) -> None: ...
    def ready(self) -> bool: ...
    def agreed(self, rid: str, *, ready: bool) -> None: ...
    def passes_over(self, rid: str) -> bool: ...
    def admitted(self, rid: str) -> None: ...
    def nap(self) -> None: ...
    def prefilled(self, tokens: int, seconds: float) -> None: ...
    @property
    def adapters(self) -> AdapterListener: ...
    def offload_begins(self, cache: Any, node_id: int) -> None: ...
    def request_arrived(self, req: Any) -> None: ...
    def request_aborted(self, rid: str) -> None: ...


class HiCacheListener(Keeper, Protocol):
    """What the storage of HiCache wants to hear of."""

    def tree_flushed(self) -> None: ...


_keeper: Keeper | None = None  # the linker or the storage, never both
_listener: Listener | None = None
_matched: str | None = None  # the request that is matched
_last_result = 0.0
_storage: HiCacheListener | None = None
_hooked: set[str] = set()


def check() -> None:
    """Raise RuntimeError that names every difference between this SGLang and what lmc was written
    for.
    """
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import (
        UnifiedTreeCoreInterface,
    )

    wrong = [
        f"linker method {name}" for name in UnifiedCacheLinker.__abstractmethods__ ^ LINKER_METHODS
    ]
    wrong += [
        f"tree method {name}"
        for name in TREE_METHODS
        if not hasattr(UnifiedTreeCoreInterface, name)
    ]
    wrong += [f"{where}.{name}" for where, name in _missing_fields()]
    _refuse(wrong + _changed(SIGNATURES))


def check_hicache() -> None:
    """As `check`, of what the storage of HiCache rests on."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    methods = HiCacheStorage.__abstractmethods__ ^ STORAGE_METHODS
    _refuse([f"storage method {name}" for name in methods] + _changed(HICACHE_SIGNATURES))


def _changed(signatures: Mapping[str, tuple[str, ...] | None]) -> list[str]:
    wrong: list[str] = []
    for target, expected in signatures.items():
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (ImportError, AttributeError):
            wrong.append(f"{target} is gone")
            continue
        if expected is not None and found != expected:
            wrong.append(f"{target}({', '.join(found)})")
    return wrong


def _refuse(wrong: Sequence[str]) -> None:
    version = importlib.metadata.version("sglang")
    if wrong:
        raise RuntimeError(
            f"sglang {version} is not the one lmc knows ({', '.join(TESTED)}); what differs: "
            + "; ".join(sorted(wrong))
        )
    if version not in TESTED:
        log.warning(
            "sglang %s: lmc was tested with %s; nothing lmc rests on differs",
            version,
            ", ".join(TESTED),
        )


def _missing_fields() -> Iterator[tuple[str, str]]:
    for where, names in FIELDS.items():
        try:
            found = pkgutil.resolve_name(where)
        except (ImportError, AttributeError):
            yield where, "*"
            continue
        fields = {name for kind in found.__mro__ for name in vars(kind).get("__annotations__", ())}
        yield from ((where, name) for name in names if name not in fields | set(dir(found)))


def on_resolution(page_size: Resolver, linker: Resolver) -> None:
    """Let `page_size` and `linker` declare arguments while SGLang resolves them: `fn(arguments so
    far, declare)`.
    """
    # The last step before SGLang gives an unset page size its default; the one that settles the
    # caches.
    _wrap_step("handle_mxfp8_kv_cache_compatibility", page_size, after=True)
    _wrap_step("handle_hicache", linker, after=False)


def _wrap_step(step: str, resolver: Resolver, *, after: bool) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook(step)  # type: ignore[untyped-decorator]
    def wrapped(server_args: Any, previous: Callable[[Any], None]) -> None:
        def declare(**fields: Any) -> None:
            declare_resolution(server_args, "lmc", **fields)

        if after:
            previous(server_args)
        resolver(resolving_view(server_args), declare)
        if not after:
            previous(server_args)


def resolved(server_args: Any) -> Any:
    """A view of the arguments as SGLang settled them; the fields keep what the user gave."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def is_mamba_hybrid(args: Any) -> bool:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model_config_of(args)) is not None


def engine_streams(device: torch.device, forward_stream: Any) -> list[int]:
    """The streams of a GPU that SGLang's pages are written and read in. Its scheduler thread works
    in one and hands forwards to another; without overlap, forwards run in the first. The one that
    is current inside a forward is that forward's.
    """
    current = torch.cuda.current_stream(device).cuda_stream
    if forward_stream is None or forward_stream.cuda_stream == current:
        return [current]
    return [current, forward_stream.cuda_stream]


def digests_between(cache: Any, ancestors: Any, low: int, high: int) -> list[str]:
    """Digests of the absolute pages `low` to `high`, which lie in `ancestors` (root first); fewer
    where a node has none.
    """
    digests: list[str] = []
    for info in reversed(ancestors):
        if info.path_end // cache.page_size <= low or high <= low:
            break
        digests = [*cache.tree_core.get_hash_values(info.node_id), *digests]
    return digests[len(digests) - (high - low) :] if high > low else []


def window_slots_between(
    cache: Any, ancestors: Any, low: int, high: int
) -> list[torch.Tensor] | None:
    """Slots of the sliding window's pool for the absolute pages `low` to `high`, which lie in
    `ancestors`; None where some of them are gone.
    """
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    page = cache.page_size
    slots: list[torch.Tensor] = []
    for info in reversed(ancestors):
        if info.path_end // page <= low or high <= low:
            break
        value = cache.tree_core.get_component_device_value(info.node_id, ComponentType.SWA)
        if value is None or len(value) != info.path_end - info.path_start:
            return None
        slots.insert(0, value[max(0, low * page - info.path_start) :])
    return slots


def hold(cache: Any, ancestors: Any, low: int) -> Callable[[], None]:
    """Keep what `ancestors` hold of the pages from `low` on; call the result, once, to let go."""
    held = [
        (info.node_id, cache.inc_lock_ref(info.node_id).to_dec_params())
        for info in ancestors
        if info.path_end // cache.page_size > low
    ]

    def let_go() -> None:
        while held:
            cache.dec_lock_ref(*held.pop())

    return let_go


def server_args() -> Any:
    """The arguments of this process's engine, for what is built without them."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def listen(listener: Listener) -> None:
    """Hook this process, once, and dispatch to `listener` from now on. Raises RuntimeError if a
    hook did not take.
    """
    global _keeper, _listener, _storage
    _keeper, _listener, _storage = listener, listener, None
    _hook(
        {
            f"{WRAPPER}.match": _on_match,
            f"{WRAPPER}._sync_restorable_prefix": _on_agreement,
            f"{WRAPPER}._offload_node": _on_offload,
            f"{WRAPPER}.release_request": _on_release,
            f"{_ADDER}.add_one_req": _on_admission,
            f"{_SCHEDULER}.process_batch_result": _on_result,
            f"{_SCHEDULER}._prefetch_kvcache": _on_arrival,
            f"{_REQUEST}.__init__": _on_request,
            f"{_LORA}.load_lora_adapter": _on_adapter,
            f"{_LORA}.load_lora_adapter_from_tensors": _on_adapter,
            _LORA_COPY: _on_adapter_copy,
            **_keepers_hooks(),
        }
    )


def listen_to_hicache(storage: HiCacheListener) -> None:
    """As `listen`, for the storage of HiCache."""
    global _keeper, _listener, _storage
    _keeper, _listener, _storage = storage, None, storage
    _hook({f"{_HICACHE}.reset": _on_flush, **_keepers_hooks()})


def stop_listening(keeper: Keeper) -> None:
    global _keeper, _listener, _storage
    if _keeper is keeper:
        _keeper = _listener = _storage = None


def _keepers_hooks() -> dict[str, Callable[..., Any]]:
    return {
        f"{_STATE}.get_internal_state": _on_internal_state,
        **dict.fromkeys(WEIGHT_CHANGES, _on_weights),
    }


def _hook(hooks: dict[str, Callable[..., Any]]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    before = {target: pkgutil.resolve_name(target) for target in hooks if target not in _hooked}
    for target in before:
        HookRegistry.register(target, hooks[target], HookType.AROUND)
    HookRegistry.apply_hooks()
    lost = [target for target in before if pkgutil.resolve_name(target) is before[target]]
    if lost:
        raise RuntimeError(
            f"another plugin hooked these first, and SGLang ignored ours: {', '.join(lost)}"
        )
    _hooked.update(before)


# Hooks call the original exactly once whatever happens: it holds SGLang's reductions over ranks.


def _on_match(orig: Any, wrapper: Any, key: Any, req: Any, result: Any) -> Any:
    global _matched
    _matched = getattr(req, "rid", None)
    if _listener is not None:
        _listener.match_begins(_matched, result.device_prefix_len // wrapper.cache.page_size)
    return orig(wrapper, key, req, result)


def _on_agreement(orig: Any, wrapper: Any, restorable: Any, **lengths: Any) -> Any:
    """The mask over which ranks agree has an element for a length of 0 that says nothing: it
    carries whether the request need not wait.
    """
    listener, rid = _listener, _matched
    if listener is None or rid is None:
        return orig(wrapper, restorable, **lengths)
    reduce = wrapper.cache._all_reduce_attn_groups

    def carrying(mask: torch.Tensor, op: Any) -> None:
        mask[0] = int(listener.ready())
        reduce(mask, op)
        listener.agreed(rid, ready=bool(mask[0]))
        mask[0] = 0

    with _replaced(wrapper.cache, "_all_reduce_attn_groups", carrying):
        return orig(wrapper, restorable, **lengths)


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Call `method` instead, on this object and inside of this block."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _on_admission(orig: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """A request that waits for chunks is passed over; those behind it are not."""
    if _listener is None or not _listener.passes_over(req.rid):
        result = orig(adder, req, *args, **kwargs)
        if _listener is not None and adder.can_run_list and adder.can_run_list[-1] is req:
            _listener.admitted(req.rid)
        return result
    from sglang.srt.managers.schedule_policy import AddReqResult

    running = adder.running_batch
    if not adder.can_run_list and (running is None or running.is_empty()):
        _listener.nap()
    # as the scheduler does for one that it does not admit
    req.kv.mamba_cow_src_index, req.kv.mamba_needs_clear = None, False
    if req.kv.holds_mamba and not getattr(req, "session", None):
        table = adder.tree_cache.req_to_token_pool
        table.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
        req.kv.mamba_pool_idx = None
    return AddReqResult.CONTINUE


def _on_result(orig: Any, scheduler: Any, batch: Any, result: Any) -> Any:
    """How fast prefill is: of batches one after the other, each from its launch, or from the
    result before.
    """
    global _last_result
    launched = getattr(batch, "launch_ts", None)
    tokens = batch.extend_num_tokens if batch.forward_mode.is_extend() else None
    output = orig(scheduler, batch, result)
    now = time.monotonic()
    if _listener is not None and launched and tokens:
        _listener.prefilled(tokens, now - max(launched, _last_result))
    _last_result = now
    return output


def _on_offload(orig: Any, wrapper: Any, node_id: int, transfers: Any) -> Any:
    if _listener is not None:
        _listener.offload_begins(wrapper.cache, node_id)
    return orig(wrapper, node_id, transfers)


def _on_release(orig: Any, wrapper: Any, rid: str) -> Any:
    result = orig(wrapper, rid)
    if _listener is not None:
        _listener.request_aborted(rid)
    return result


def _on_arrival(orig: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    if _listener is not None:
        _listener.request_arrived(req)
    return orig(scheduler, req, *args, **kwargs)


def _on_weights(orig: Any, *args: Any, **kwargs: Any) -> Any:
    if _keeper is not None:
        _keeper.weights_changed()
    return orig(*args, **kwargs)


def _on_internal_state(orig: Any, *args: Any, **kwargs: Any) -> Any:
    output = orig(*args, **kwargs)
    if _keeper is not None:
        output.internal_state["lmc"] = _keeper.snapshot()
    return output


# --- adapters: SGLang joins an adapter's id to the extra key of its requests


_names_for: Callable[[Any], AdapterNames | None] | None = None
_names: AdapterNames | None = None
"""Of the engine that this process launched last; SGLang's own context is as global."""


def on_adapters(names_for: Callable[[Any], AdapterNames | None]) -> None:
    """Let `names_for(resolved arguments)` give ids to the adapters of every engine that this
    process launches from now on; they travel with SGLang's references to adapters.

    Raises RuntimeError as `check` and `listen` do.
    """
    global _names_for
    if _names_for is None:
        check()
        _hook({_LORA_ARGUMENTS: _on_adapter_arguments})
        # An official hook would take the place of this class in every module that knows it.
        pkgutil.resolve_name(_LORA_CONTROL).LoRARef = _new_adapter
    _names_for = names_for


def _on_adapter_arguments(orig: Any, server_args: Any) -> Any:
    global _names
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    result = orig(server_args)
    args = resolving_view(server_args)
    _names = _names_for(args) if _names_for is not None and args.enable_lora else None
    if _names is not None:
        declare_resolution(server_args, "lmc", lora_paths=[_named(ref) for ref in args.lora_paths])
    return result


def _new_adapter(**fields: Any) -> Any:
    """Stands for SGLang's reference where it makes one for an adapter to be loaded."""
    from sglang.srt.lora.lora_registry import LoRARef

    return _named(LoRARef(**fields))


def _named(ref: Any) -> Any:
    name, path = ref.lora_name, ref.lora_path
    lora_id = _names.id_of(name, path) if _names is not None else None
    return ref if lora_id is None else type(ref)(lora_id, name, path, ref.pinned)


def lora_settings() -> Any:
    """As they were resolved: `enable_lora`, `lora_paths`, `lora_target_modules`."""
    from sglang.srt.runtime_context import get_lora

    return get_lora()


def extra_key_of(tree: Any, node_id: int) -> str | None:
    extra_key: str | None = tree.prefetch_anchor_info(node_id)[0]
    return extra_key


def _on_request(orig: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    orig(req, *args, **kwargs)
    if _listener is not None and req.extra_key and req.lora_id is None:
        req.extra_key = _listener.adapters.apart(req.extra_key)


def _on_adapter(orig: Any, manager: Any, lora_ref: Any, *args: Any, **kwargs: Any) -> Any:
    result = orig(manager, lora_ref, *args, **kwargs)
    changed = _listener.adapters.loaded(lora_ref) if _listener and result.success else ""
    if not changed:
        return result
    manager.unload_lora_adapter(lora_ref)
    return manager.create_lora_update_result(success=False, error_message=changed)


def _on_adapter_copy(orig: Any, pool: Any, uid: str | None, *args: Any, **kwargs: Any) -> Any:
    result = orig(pool, uid, *args, **kwargs)
    if _listener is not None:
        _listener.adapters.copied(uid)
    return result


def _on_flush(orig: Any, controller: Any) -> Any:
    result = orig(controller)
    if _storage is not None:
        _storage.tree_flushed()
    return result
