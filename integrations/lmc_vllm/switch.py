"""Teaches vLLM's options the backend name `lmc`, in every process that builds a configuration.

vLLM's list of offloading backends is closed, so two functions are wrapped: the one that builds the
engine's configuration, and the one that builds the command line. Both call what they found, so
other plugins may wrap them too, before or after. Where this vLLM has no such functions nothing
changes and one line says so; a plain `kv_transfer_config` works without any of this.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from lmc.config import Config

from . import compat

log = logging.getLogger("lmc")

BACKEND = "lmc"
CONNECTOR = "LMCConnector"
MODULE = "lmc_vllm.connector"
POLICY = "kv_load_failure_policy"
GIB = 1 << 30


def register() -> None:
    """Wrap vLLM's `EngineArgs`, once a process. Never raises: vLLM would not start."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        if getattr(EngineArgs, "_lmc_registered", False):
            return
        inner_config = EngineArgs.create_engine_config
        inner_cli = EngineArgs.__dict__["add_cli_args"].__func__
    except (ImportError, AttributeError, KeyError) as error:
        log.warning(
            "lmc cannot add its name to this vLLM's kv_offloading_backend (%s); "
            "kv_transfer_config with kv_connector_module_path=%r works",
            error,
            MODULE,
        )
        return

    @functools.wraps(inner_config)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        unasked = _apply(self)
        config = inner_config(self, *args, **kwargs)
        if unasked and config.model_config.is_encoder_decoder:
            log.info("lmc stays off: vLLM gives encoder-decoder models no KV connector")
            self.kv_transfer_config = None
            config = inner_config(self, *args, **kwargs)
        if _asks_for_lmc(self.kv_transfer_config):
            compat.mark_given_ids()
        return config

    @functools.wraps(inner_cli)
    def add_cli_args(parser: Any) -> Any:
        parser = inner_cli(parser)
        for action in parser._actions:
            if "--kv-offloading-backend" in action.option_strings and action.choices is not None:
                action.choices = [*dict.fromkeys((*action.choices, BACKEND))]
        return parser

    EngineArgs.create_engine_config = create_engine_config
    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    EngineArgs._lmc_registered = True


def _apply(args: Any) -> bool:
    """Turn the name into a connector, where it is asked for: by `kv_offloading_backend`, or by
    LMC_ENABLE=1 and nothing else said about KV transfer. LMC_ENABLE=0 wins. Whether the environment
    alone put it there.
    """
    enable = Config.asks_for_lmc()
    named = args.kv_offloading_backend == BACKEND
    if enable is False and named:
        log.info("lmc stays off: LMC_ENABLE says so")
        args.kv_offloading_backend, args.kv_offloading_size = "native", None
        return False
    if not named:
        if not enable:
            return False
        if args.kv_transfer_config is not None or args.kv_offloading_size is not None:
            if getattr(args.kv_transfer_config, "kv_connector", None) != CONNECTOR:
                log.info("lmc stays off: this engine has another KV connector")
            return False
    args.kv_transfer_config = _transfer_config(args.kv_transfer_config, args.kv_offloading_size)
    # vLLM maps a size to one of its own connectors; without one the backend's name is idle
    args.kv_offloading_backend, args.kv_offloading_size = "native", None
    return not named


def _asks_for_lmc(given: Any) -> bool:
    """Whether an engine has lmc's connector, alone or in a MultiConnector."""
    fields = given if isinstance(given, dict) else vars(given) if given is not None else {}
    parts = (fields.get("kv_connector_extra_config") or {}).get("connectors", ())
    return any(part.get("kv_connector") == CONNECTOR for part in (fields, *parts))


def _transfer_config(given: Any, size_gib: float | None) -> Any:
    from vllm.config import KVTransferConfig

    fields = dict(given) if isinstance(given, dict) else {}
    config = given if isinstance(given, KVTransferConfig) else KVTransferConfig(**fields)
    if config.kv_connector not in (None, CONNECTOR):
        raise ValueError(
            f'kv_offloading_backend="lmc" and kv_transfer_config with {config.kv_connector} ask '
            "for two connectors; MultiConnector takes both"
        )
    config.kv_connector, config.kv_connector_module_path = CONNECTOR, MODULE
    config.kv_role = "kv_both"
    extra = config.kv_connector_extra_config
    if POLICY in fields:
        extra.setdefault(POLICY, fields[POLICY])
    if size_gib is not None:
        extra["ram_bytes"] = int(size_gib * GIB)
    return config
