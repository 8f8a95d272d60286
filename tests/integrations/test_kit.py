"""SGLang's own test kit of its radix cache (`sglang.test.kits.unified_radix_cache`) with lmc's
linker attached. The wheel ships fixtures of tests, and of the tests themselves none: there is no
`test_*` in that package. So the operations of its fixtures run here: in a random walk over every
configuration of CONFIGS, none of which lmc refuses, and one by one, where what they find with the
linker must be what they find without.

What of the kit does not apply, and why:

    hicache.py, `_init_hicache`, `_backup_*`,    HiCache's host pools and its own write-back and
    `_load_back_node`, `_simulate_backup*`,      load-back: with a linker there is no host tier;
    `_swa_anchor_setup`, `_swa_finalize_setup`,  test_hicache_tree.py has them over lmc
    `_set_aux_host_tombstone`
    storage.py                                   HiCache's storage, prefetch and their acks
    load_back.py: LoadBackPending                a mocked tree core that commits loads into the
                                                 tree; a linker's loads join it by insertion
    kv_events.py                                 block events for routers, published by the tree; a
                                                 linker neither makes nor sees one
    core.py: Int8MambaCheckpoint                 states kept as int8 checkpoints: refused by name
                                                 (test_refusals.py)
    core.py: FakeFullComponent, DisabledUnified- components of tests, a cache that is switched off:
    RadixCache, UnifiedLRUList, PagedFull        no pool or no tree that a linker could serve
    core.py: DecoderSwaBoundedReplay, SWADraft-  need a ring of windows or draft windows, in no
    History, SWAWindowUnderBigramKey             configuration of CONFIGS; lmc's own tests have
                                                 drafts and bigrams (test_models.py)
    insert_walk.py: SegmentLockFuzz, beyond      it cuts windows at any token, which the tree
    pages of one token                           refuses, with a linker or without
    insert_walk.py: StreamingSession             turns inside a session go past the linker
    the white boxes of the Rust core             its inspection build is not in the wheel: the
                                                 engine's build does the walk and the fuzz
    kits/unified_radix_cache_kit.py              the only `test_*`: of a served model on a GPU
                                                 (GSM8K, log probabilities of turns, HiCache's L3)
"""

from __future__ import annotations

import unittest
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import publish

from tests.integrations.fixtures import SERVER_ARGS
from tests.integrations.kit import (
    CONFIGS,
    CORES,
    Kit,
    Walk,
    core,
    insert_walk,
    match_prefix,
    node_device_value,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sglang.test.kits.unified_radix_cache.config import CacheConfig

SWA, MAMBA = ComponentType.SWA, ComponentType.MAMBA
every_config = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.label)
every_core = pytest.mark.parametrize("tree_core", CORES)


def config_of(label: str) -> CacheConfig:
    (cfg,) = (cfg for cfg in CONFIGS if cfg.label == label)
    return cfg


@pytest.fixture
def kit(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    for name in ("LMC_TIERS", "LMC_SALT", "LMC_MODEL_VERSION", "LMC_CHUNK_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LMC_RAM_GB", "0.3")
    kit = Kit(msgspec.structs.replace(SERVER_ARGS, model_path=str(model_folder)), monkeypatch)
    yield kit
    kit.close()
    publish(SERVER_ARGS, role="scheduler")  # the kit's caches publish their own


@every_core
@every_config
def test_a_random_walk_leaves_nothing_behind(kit, cfg, tree_core):
    walk = Walk(kit, cfg, tree_core, seed=1)
    walk.run(80)
    walk.restore()
    walk.end()


@every_core
@pytest.mark.parametrize(
    ("label", "gb"), [("FULL_ps16", "0.008"), ("FULL_SWA_MAMBA_ps64_sw64", "0.06")]
)
def test_a_walk_in_ram_for_few_chunks(kit, monkeypatch, label, gb, tree_core):
    """Offloads find no room, and what was there is gone by the time it is asked for."""
    monkeypatch.setenv("LMC_RAM_GB", gb)
    walk = Walk(kit, config_of(label), tree_core, seed=2)
    walk.run(80)
    walk.end()
    assert sum(lane.store.gauges()["ram.evictions"] for lane in walk.linker.lanes)


@every_core
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "label", ["FULL_SWA_ps1_sw4", "FULL_SWA_ps1_sw128", "FULL_SWA_MAMBA_ps1_sw128_h8l32"]
)
def test_the_kits_fuzz_of_locks(kit, label, seed, tree_core):
    """With the kit's own steps: windows cut off at insertion, at any token, and locks given up in
    part.
    """
    kit.use(tree_core)
    fuzz = insert_walk.SegmentLockFuzzFixtures()
    # it gives no request back
    fuzz.cfg = replace(config_of(label), max_num_reqs=100, mamba_cache_size=300)
    fuzz._run_seed(seed, steps=80)
    (cache,) = kit.caches
    settle(cache)
    cache.sanity_check()
    assert cache.full_protected_size() == cache.swa_protected_size() == 0


class Recover(insert_walk.ResumableInsertWalkSWAFixtures):
    """A window that was gone comes back with the next insertion."""

    labels = "FULL_SWA_ps1_sw4", "FULL_SWA_ps1_sw128", "FULL_SWA_ps64_sw64"

    def find(self) -> Any:
        results = [
            self._recover_swa_tombstone_with_tracking(lock_full=lock)[0] for lock in (False, True)
        ]
        return [(found.prefix_len, found.adopted_ranges) for found in results]


class Release(insert_walk.SegmentLockProtocolFixtures, unittest.TestCase):
    """A lock's receipt is refused at a node that is not its own."""

    labels = "FULL_SWA_ps1_sw4", "FULL_SWA_ps4_sw4"

    def find(self) -> Any:
        cache, allocator, leaf = self._leaf_with_lock_path()
        receipt = cache.inc_lock_ref(leaf).to_dec_params()
        self._assert_unanchored_release_rejected(
            cache,
            allocator,
            leaf,
            lambda: cache.dec_lock_ref(cache.root_node_handle(), receipt),
            lambda: cache.dec_lock_ref(leaf, receipt),
        )
        return self._locked_path_state(cache, allocator, leaf)


class Chain(core.UnifiedRadixCacheCoreFixtures):
    """Nodes of a page each, one evicted."""

    labels = tuple(cfg.label for cfg in CONFIGS)

    def find(self) -> Any:
        cache, allocator, table = core.build_fixture(self.cfg)
        chain = self._build_chain_pages(cache, allocator, table, 5)
        before = allocator.available_size()
        for component in self.cfg.components[1:]:
            self._evict_device_component(cache, chain[1], component)
        values = [
            [node_device_value(cache, node, component) for component in self.cfg.components]
            for node in chain
        ]
        found = [[None if value is None else value.tolist() for value in of] for of in values]
        return found, before, allocator.available_size()


class Room(core.UnifiedRadixAllocationEvictionRealComponentsFixtures, unittest.TestCase):
    """Eviction for an allocation stops as soon as there is room."""

    labels = ("FULL_ps1",)
    _SHORTFALL = 2

    def find(self) -> Any:
        found = []
        for component in (SWA, MAMBA):
            cache, *nodes = self._build_internal_chain(component, False)
            result, drains = self._evict_for_alloc_after_first_drain(cache, component)
            left = [
                cache.tree_core.contains_node(node)
                and node_device_value(cache, node, component) is not None
                for node in nodes
            ]
            found.append((result, drains, left))
        return found


class Branch(core.MambaCheckpointGridFixtures, unittest.TestCase):
    """Where a state could be kept that is not."""

    labels = ("FULL_MAMBA_ps1",)

    def find(self) -> Any:
        return [
            self._branching_seqlen(tree_page_size=1, full_hit_length=length)
            for length in (63, 64, 150)
        ]


class Overshoot(core.MambaFinishedOvershootCheckpointFixtures, unittest.TestCase):
    """A request that ends behind its last state."""

    labels = ("FULL_MAMBA_ps4",)
    _rid = 0

    def find(self) -> Any:
        found = []
        for tracked in (None, 8):
            cache, allocator, table = core.build_fixture(self.cfg)
            req, ids = self._build_req(allocator, table, tracked)
            req.last_node = cache.root_node_handle()
            core.finish_req(cache, req, up_to=len(ids))
            match = match_prefix(cache, ids)
            found.append((match.device_prefix_len, allocator.available_size()))
        return found


@pytest.mark.parametrize(
    ("suite", "label"),
    [
        (suite, label)
        for suite in (Recover, Release, Chain, Room, Branch, Overshoot)
        for label in suite.labels
    ],
    ids=lambda of: getattr(of, "__name__", of),
)
def test_the_kits_steps_find_the_same_without_a_linker(kit, suite, label):
    """On the core that has the kit's white boxes."""
    kit.use("python")
    kit.at_once = True
    found = []
    for kit.attaching in (False, True):
        one = suite()
        one.cfg = config_of(label)
        found.append(one.find())
    assert found[0] == found[1]
    assert kit.linkers
    for cache in kit.caches:
        cache.check_hicache_events()
        assert not (cache.linker and cache.linker.pending_offloads)
