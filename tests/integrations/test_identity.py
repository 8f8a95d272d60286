"""Which part of the KV a rank holds, with whom it shares memory and who feeds the tiers below, for
every way SGLang lays out its ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.runtime_context import derive_attention_ranks, derive_attn_tp_size
from sglang.srt.server_args import ServerArgs
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmc.config import Config
from lmc_sglang import pools
from lmc_sglang.identity import Ranks, namespace_of
from tests.integrations.fixtures import SERVER_ARGS

_PLAIN = SimpleNamespace(pp_size=1, attn_cp_size=1, tp_cache_group=None, attn_tp_cache_group=None)


def arguments(**given: object) -> ServerArgs:
    """As a scheduler process gets them: what the user gave, and what SGLang made of it beside."""
    args = ServerArgs(model_path="dummy", device="cpu", page_size=64, **given)
    args.resolve_once()
    return args


@contextlib.contextmanager
def world(rank: int, size: int):
    """This process as one rank of several, in groups that never talk."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def every_rank(args: ServerArgs, *, replicated: bool = False) -> list[Ranks]:
    """Of one tensor-parallel group, grouped for attention as SGLang does."""
    tp, dp = args.tp_size, args.attn_dp_size if args.attn_dp_size > 1 else 1
    if args.enable_dp_attention:
        dp = args.dp_size
    width = derive_attn_tp_size(tp_size=tp, attn_cp_size=1, attn_dp_size=dp)
    found = []
    for rank in range(tp):
        with world(rank, tp):
            at, group = derive_attention_ranks(tp_rank=rank, attn_tp_size=width, attn_cp_size=1)
            members = list(range(group * width, (group + 1) * width))
            assert members[at] == rank
            own = torch.distributed.new_group(members) if width < tp else None
            params = SimpleNamespace(
                pp_size=1,
                attn_cp_size=1,
                tp_cache_group=own or torch.distributed.group.WORLD,
                attn_tp_cache_group=own or torch.distributed.group.WORLD,
            )
            found.append(Ranks.of(args, params, replicated=replicated))
    return found


def parts(ranks: list[Ranks]) -> list[str]:
    return [f"{r.rank}/{r.size}" for r in ranks]


def test_one_rank_alone():
    assert Ranks.of(SERVER_ARGS, _PLAIN) == Ranks(0, 1, agreeing=1, on_this_machine=1, writes=True)


def test_tensor_parallel_ranks_hold_a_part_each_and_all_write():
    ranks = every_rank(arguments(tp_size=4))
    assert parts(ranks) == ["0/4", "1/4", "2/4", "3/4"]
    assert {(r.agreeing, r.on_this_machine, r.writes) for r in ranks} == {(4, 4, True)}


@pytest.mark.parametrize(
    "given",
    [{"attn_dp_size": 2}, {"dp_size": 2, "enable_dp_attention": True}],
    ids=["attn_dp_size", "enable_dp_attention"],
)
def test_equal_parts_of_attentions_groups_have_equal_names(given):
    """Data-parallel attention: two groups of two, each with requests of its own."""
    ranks = every_rank(arguments(tp_size=4, **given))
    assert parts(ranks) == ["0/2", "1/2", "0/2", "1/2"]
    assert {(r.agreeing, r.on_this_machine, r.writes) for r in ranks} == {(2, 4, True)}


@pytest.mark.parametrize("replicated", [False, True])
def test_a_group_of_one_rank_for_attention_agrees_with_nobody(replicated):
    ranks = every_rank(arguments(tp_size=4, attn_dp_size=4), replicated=replicated)
    assert parts(ranks) == ["0/1"] * 4
    assert {(r.agreeing, r.on_this_machine, r.writes) for r in ranks} == {(1, 4, True)}


@pytest.mark.parametrize(
    ("given", "sharing"),
    [
        ({}, 1),
        ({"tp_size": 8}, 8),
        ({"tp_size": 8, "nnodes": 2, "dist_init_addr": "127.0.0.1:1"}, 4),
        ({"tp_size": 2, "dp_size": 4}, 8),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, 8),
        ({"tp_size": 8, "attn_dp_size": 4}, 8),
        ({"tp_size": 8, "ep_size": 8}, 8),
        (
            {
                "tp_size": 16,
                "dp_size": 16,
                "enable_dp_attention": True,
                "nnodes": 4,
                "dist_init_addr": "127.0.0.1:1",
            },
            4,
        ),
    ],
    ids=str,
)
def test_a_machines_memory_is_shared_out_among_the_ranks_on_it(given, sharing):
    ranks = Ranks.of(arguments(**given), _PLAIN)
    assert ranks.on_this_machine == sharing
    config = Config(ram_bytes=64 * 10**9)
    assert config.ram_bytes_of_rank(ranks.on_this_machine) == 64 * 10**9 // sharing


def test_what_sglang_settled_counts_not_what_was_given():
    """A feature may turn replicas into attention's groups: the field keeps what the user gave."""
    args = arguments(tp_size=4, dp_size=4)
    assert Ranks.of(args, _PLAIN).on_this_machine == 16
    args._resolved_overrides.append(("a feature", {"attn_dp_size": 4, "dp_size": 1}))
    assert args.dp_size == 4
    assert Ranks.of(args, _PLAIN).on_this_machine == 4


def test_machines_that_do_not_divide_the_ranks():
    """SGLang refuses them at start but for ranks that join later; these have a share all the
    same.
    """
    args = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1, nnodes=4, dcp_size=1)
    assert Ranks.of(args, _PLAIN).on_this_machine == 1


# --- ranks that hold the same


def test_of_ranks_that_hold_the_same_one_writes():
    ranks = every_rank(arguments(tp_size=4), replicated=True)
    assert parts(ranks) == ["0/1"] * 4
    assert [r.writes for r in ranks] == [True, False, False, False]
    assert {r.agreeing for r in ranks} == {4}, "they still have to answer alike"


def test_of_ranks_that_hold_the_same_one_a_machine_writes():
    args = arguments(tp_size=8, nnodes=2, dist_init_addr="127.0.0.1:1")
    writing = [r.writes for r in every_rank(args, replicated=True)]
    assert writing == [True, False, False, False] * 2


def test_of_ranks_that_hold_the_same_one_a_group_of_attentions_writes():
    """Groups have requests of their own: nobody else has what a group computes."""
    ranks = every_rank(arguments(tp_size=4, attn_dp_size=2), replicated=True)
    assert parts(ranks) == ["0/1"] * 4
    assert [r.writes for r in ranks] == [True, False, True, False]


def test_a_group_that_spans_machines_has_a_writer_on_each():
    args = arguments(tp_size=8, attn_dp_size=2, nnodes=4, dist_init_addr="127.0.0.1:1")
    writing = [r.writes for r in every_rank(args, replicated=True)]
    assert writing == [True, False, True, False] * 2


def test_equal_parts_share_a_namespace_and_others_do_not(harness):
    h = harness()
    pool = pools.describe(h.params, set(h.params.tree_components))[0]

    def digest(ranks: Ranks) -> bytes:
        return namespace_of(h.server_args, Config(), pool, h.store.layout, ranks).digest

    two = Ranks(0, 2, agreeing=2, on_this_machine=2)
    assert digest(two) == digest(dataclasses.replace(two, on_this_machine=4, writes=False))
    others = [dataclasses.replace(two, rank=1), dataclasses.replace(two, size=4), Ranks(0, 1, 1, 1)]
    assert len({digest(two), *map(digest, others)}) == 4


# --- refused


def test_a_context_that_decoding_splits_is_refused():
    """SGLang's own arguments let it pass beside a linker."""
    with pytest.raises(ValueError, match="dcp_size=2"):
        Ranks.of(arguments(tp_size=4, dcp_size=2), _PLAIN)
