"""Switches lmc on in the launching process: SGLang's own resolution hooks declare the linker, no
patch.

What is declared travels to the scheduler processes with SGLang's arguments. Where another feature
takes the place of the linker nothing is declared and one line says why. `page_size` becomes 64 only
where neither the user nor a backend has chosen one: pages of one token cost SGLang and lmc 64 times
the hashing.
"""

from __future__ import annotations

import logging
from typing import Any

from lmc.config import Config

from . import compat
from .adapters import Names

log = logging.getLogger("lmc")

PAGE_TOKENS = 64
LINKER_MODULE = "lmc_sglang.linker"
LINKER = {
    "linker": "LmcLinker",
    "linker_module_path": LINKER_MODULE,
    "linker_extra_config": {},
}
HICACHE = "lmc_sglang.hicache"
_BELOW = f"; it can be the storage of HiCache instead: backend dynamic, module {HICACHE}"
HINTS = {"--enable-hierarchical-cache": _BELOW, "--hicache-storage-backend": _BELOW}

_on = False


def switch_on() -> None:
    """Declare lmc for every engine that this process launches from now on. LMC_ENABLE=0 wins; a
    second call is void.
    """
    global _on
    if _on:
        return
    _on = True
    if Config.asks_for_lmc() is False:
        log.info("lmc stays off: LMC_ENABLE says so")
        return
    compat.on_resolution(page_size=_declare_page_size, linker=_declare_linker)


def _declare_page_size(args: Any, declare: compat.Declare) -> None:
    """Runs after every backend had its say and before SGLang's default of one token."""
    if args.page_size is None and not _taken(args) and not _forbids_paging(args):
        declare(page_size=PAGE_TOKENS)


def _declare_linker(args: Any, declare: compat.Declare) -> None:
    if args.enable_unified_cache_external_linker:
        on = _is_ours(args)
    elif taken := _taken(args):
        if HICACHE in (args.hicache_storage_backend_extra_config or ""):
            log.info("lmc is the storage of HiCache; its linker stays off")
        else:
            log.warning("lmc stays off: it cannot run with %s%s", taken, HINTS.get(taken, ""))
        return
    else:
        declare(
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config=LINKER,
        )
        on = True
    if on and (args.enable_lora or args.lora_paths):
        compat.on_adapters(_adapter_names)


def _is_ours(args: Any) -> bool:
    linker = args.unified_cache_external_linker_config
    return isinstance(linker, dict) and linker.get("linker_module_path") == LINKER_MODULE


def _adapter_names(args: Any) -> Names | None:
    """Where lmc is the linker, and no other machine gives the same adapters ids of its own."""
    return Names(args) if _is_ours(args) and args.nnodes == 1 else None


def _taken(args: Any) -> str:
    """The setting that leaves no place for a linker, or "": each would be an error of SGLang's
    later on.
    """
    obstacles = {
        "--disable-radix-cache": args.disable_radix_cache,
        "--radix-cache-backend": args.radix_cache_backend is not None,
        "--enable-hierarchical-cache": args.enable_hierarchical_cache,
        "--hicache-storage-backend": args.hicache_storage_backend is not None,
        "--enable-lmcache": args.enable_lmcache,
        "--pp-size above 1": args.pp_size > 1,
        "--attn-cp-size above 1": args.attn_cp_size > 1,
        "--dcp-size above 1": args.dcp_size > 1,
        **{flag: getattr(args, name) for flag, name in compat.EXCLUSIVE_FLAGS.items()},
    }
    return next((flag for flag, present in obstacles.items() if present), "")


def _forbids_paging(args: Any) -> bool:
    """Features that want pages of one token, or a chunked prefill that does not come in pages."""
    chunk = args.chunked_prefill_size
    return bool(
        (args.speculative_eagle_topk or 0) > 1
        or args.dllm_algorithm is not None
        or (chunk is not None and chunk > 0 and chunk % PAGE_TOKENS)
        or compat.is_mamba_hybrid(args)
    )
