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
    insert_walk.py: StreamingSession             turns inside a session go past the linker
    the white boxes of the Rust core             its inspection build is not in the wheel: the
                                                 engine's build does the walk and the fuzz
    kits/unified_radix_cache_kit.py              the only `test_*`: of a served model on a GPU
                                                 (GSM8K, log probabilities of turns, HiCache's L3)
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import publish

from tests.integrations.fixtures import SERVER_ARGS
from tests.integrations.kit import CONFIGS, CORES, Kit, Walk, core, insert_walk, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sglang.test.kits.unified_radix_cache.config import CacheConfig

SWA, MAMBA = ComponentType.SWA, ComponentType.MAMBA
every_config = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.label)
every_core = pytest.mark.parametrize("tree_core", CORES)


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
    walk.end()
    assert walk.loaded


@every_core
@pytest.mark.parametrize("label", ["FULL_ps16", "FULL_SWA_MAMBA_ps64_sw64"])
def test_a_walk_in_ram_for_few_chunks(kit, monkeypatch, label, tree_core):
    """Offloads find no room, and what was there is gone by the time it is asked for."""
    (cfg,) = (cfg for cfg in CONFIGS if cfg.label == label)
    monkeypatch.setenv("LMC_RAM_GB", {"FULL_ps16": "0.008"}.get(label, "0.06"))
    walk = Walk(kit, cfg, tree_core, seed=2)
    walk.run(80)
    assert sum(lane.store.gauges()["ram.evictions"] for lane in walk.linker.lanes)
    walk.end()
