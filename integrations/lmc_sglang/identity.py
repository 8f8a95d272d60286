"""Who this rank is: the namespace of its chunks."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lmc.keys import Namespace
from lmc.weights import name_of as weights_name

from . import compat

if TYPE_CHECKING:
    from lmc.config import Config
    from lmc.layout import KVLayout

log = logging.getLogger("lmc")

HASHING = "sglang-sha256-chain-v1"
_FROM_THE_FOLDER = (
    "auto",
    "pt",
    "safetensors",
    "npcache",
    "fastsafetensors",
    "gguf",
    "bitsandbytes",
    "mistral",
    "layered",
)
"""Load formats whose weights are the files of the model's folder; others may come from anywhere."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Position among the ranks that share a request: part `rank` of `size` parts of the KV.

    Under data-parallel attention each group of them has requests of its own. Equal parts have equal
    names, whatever group or machine holds them: tiers below RAM are shared.
    """

    rank: int
    size: int
    agreeing: int
    """Ranks that must answer alike."""
    on_this_machine: int
    """Ranks that share this machine's memory."""
    writes: bool = True
    """Whether chunks go down from here. Of ranks that hold the same KV one a machine does it for
    all: a disk serves the ranks of its machine, and what two machines write twice does no harm."""

    @classmethod
    def of(cls, server_args: Any, params: Any, *, replicated: bool = False) -> Ranks:
        """`replicated`: each rank holds all of the KV, as with MLA's latent. Raises ValueError for
        topologies whose ranks SGLang does not let agree.
        """
        args = compat.resolved(server_args)
        if params.pp_size > 1:
            raise ValueError(
                f"lmc does not serve pipeline parallelism (pp_size={params.pp_size}): "
                "SGLang does not let pipeline stages agree on what was found"
            )
        if params.attn_cp_size > 1:
            raise ValueError(
                f"lmc does not serve context parallelism (attn_cp_size={params.attn_cp_size})"
            )
        if args.dcp_size > 1:
            raise ValueError(
                "lmc does not serve parallelism over the context of decoding "
                f"(dcp_size={args.dcp_size}): a rank's pool holds a part of each page"
            )
        # a group of attention's for one rank alone is one too: then nobody has to agree
        group = params.attn_tp_cache_group or params.tp_cache_group
        members = torch.distributed.get_process_group_ranks(group) if group else [0]
        rank = torch.distributed.get_rank(group) if group else 0
        here = _machine_of(args, members[rank])
        first = [_machine_of(args, member) for member in members].index(here)
        return cls(
            rank=0 if replicated else rank,
            size=1 if replicated else len(members),
            agreeing=len(members),
            on_this_machine=ranks_of_a_machine(server_args),
            writes=not replicated or rank == first,
        )


class Described(Protocol):
    """A pool of the engine's, as far as its chunks' names go."""

    @property
    def fields(self) -> dict[str, str]: ...


def ranks_of_a_machine(server_args: Any) -> int:
    """Ranks of data-parallel attention and of experts are ranks of the tensor-parallel group;
    data-parallel replicas have such a group each, and so have pipeline stages.
    """
    settled = compat.resolved(server_args)
    ranks = settled.tp_size * settled.pp_size * settled.dp_size
    return max(1, int(ranks // settled.nnodes))


def _machine_of(args: Any, rank: int) -> int:
    """Machines have equal shares of the tensor-parallel group, in its order."""
    return rank // max(1, int(args.tp_size // args.nnodes))


def namespace_of(
    server_args: Any, config: Config, pool: Described, layout: KVLayout, ranks: Ranks
) -> Namespace:
    """Everything that changes the bytes of this rank's chunks, apart from the tokens."""
    weights = weights_name(
        server_args.model_path,
        config.model_version,
        server_args.revision,
        server_args.download_dir,
        in_folder=server_args.load_format in _FROM_THE_FOLDER,
    )
    drafts = _draft_weights(server_args, config, pool)
    weights = f"{weights}{drafts}" if weights and drafts is not None else ""
    namespace = Namespace.of(
        {
            "engine": "sglang",
            "hashing": HASHING,
            "weights": weights or "unknown",
            "dtype": str(server_args.dtype),
            "quantization": str(server_args.quantization),
            "model_override_args": str(server_args.json_model_override_args),
            "kv_scales": _digest_of(server_args.quantization_param_path),
            "rank": f"{ranks.rank}/{ranks.size}",
            "salt": config.salt,
            **pool.fields,
            **layout.describe(),
        }
    )
    if weights:
        return namespace
    log.warning(
        "lmc cannot tell the weights of %s apart from others: chunks stay in this process. "
        "LMC_MODEL_VERSION=<name of the weights> lets them outlive it",
        server_args.model_path,
    )
    return namespace.next_generation()


def _draft_weights(server_args: Any, config: Config, pool: Described) -> str | None:
    """What tells the weights of a draft model whose KV is kept beside the model's apart; "" without
    one, None if nothing does.
    """
    path = server_args.speculative_draft_model_path
    if not path or not any(name.startswith("draft") for name in pool.fields):
        return ""
    load_format = server_args.speculative_draft_load_format or server_args.load_format
    name = weights_name(
        path,
        config.model_version,
        server_args.speculative_draft_model_revision,
        server_args.download_dir,
        in_folder=load_format in _FROM_THE_FOLDER,
    )
    return f" draft {name}" if name else None


def _digest_of(path: str | None) -> str:
    """Content of a file that changes what the KV means; a missing one is SGLang's to refuse."""
    if path is None or not os.path.isfile(path):
        return str(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
