"""The storage below HiCache, against SGLang's real host pools: a page that was kept comes back byte
for byte, or not at all. SGLang's own view of a page is the oracle.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import (
    AsymmetricMHATokenToKVPoolHost,
    MHATokenToKVPoolHost,
)
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from lmc.testing import FaultyTier
from lmc.testing.faulty import Fault
from lmc.tiers import open_tiers
from lmc_sglang import compat, page_store, switch
from tests.core.chunks import wait_until
from tests.integrations.fixtures import SERVER_ARGS, make_model

PAGE, LAYERS = 64, 4
EXTRA = {
    "backend_name": "lmc",
    "module_path": "lmc_sglang.hicache",
    "class_name": "LmcHiCache",
    "interface_v1": 1,
}
MHA = ("layer_first", "page_first", "page_first_direct")
KINDS = [*(("mha", layout) for layout in MHA), *(("mla", layout) for layout in MHA)]


def host_pool(kind: str, layout: str, *, page: int = PAGE, pages: int = 31):
    """SGLang's own, of `pages` and one more."""
    tokens = page * pages
    common = {
        "size": tokens,
        "page_size": page,
        "dtype": torch.float32,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if kind == "mla":
        pool = MLATokenToKVPool(kv_lora_rank=64, qk_rope_head_dim=32, **common)
        host, more = MLATokenToKVPoolHost, {"target_layer_num": LAYERS}
    else:
        v = {"v_head_dim": 16} if kind == "asymmetric" else {}
        pool, more = MHATokenToKVPool(head_num=2, head_dim=32, **v, **common), {}
        host = AsymmetricMHATokenToKVPoolHost if v else MHATokenToKVPoolHost
    (info,) = pool.get_device_pool_infos()
    return host(
        info.buffer_info,
        1.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=tokens,
        start_layer=0,
        end_layer=LAYERS,
        **more,
    )


def chain(name: str, n: int) -> list[str]:
    """Digests as SGLang makes them: each covers the one before."""
    digests, last = [], name.encode()
    for _ in range(n):
        last = hashlib.sha256(last).digest()
        digests.append(last.hex())
    return digests


class Door:
    """A storage with its host pool, and HiCache's part by hand."""

    def __init__(self, host, config: HiCacheStorageConfig) -> None:
        self.host = host
        self.storage = StorageBackendFactory.create_backend("dynamic", config, host)
        self.storage.register_mem_pool_host(host)
        self.storage.register_mem_host_pool_v2(host, PoolName.KV)
        self.storage.on_host_pools_registered()
        self.store = self.storage._pages._store

    def slots(self, pages: list[int]) -> torch.Tensor:
        page = self.host.page_size
        return torch.cat([torch.arange(p * page, (p + 1) * page) for p in pages])

    def bytes_of(self, key: str) -> torch.Tensor:
        """A page is a function of its key."""
        shape = self.host.get_dummy_flat_data_page().shape
        return torch.rand(shape, generator=torch.Generator().manual_seed(int(key[:12], 16)))

    def fill(self, keys: list[str], pages: list[int]) -> None:
        for key, page in zip(keys, pages, strict=True):
            self.host.set_from_flat_data_page(page * self.host.page_size, self.bytes_of(key))

    def check(self, keys: list[str], pages: list[int]) -> None:
        for key, page in zip(keys, pages, strict=True):
            found = self.host.get_data_page(page * self.host.page_size, flat=True)
            assert torch.equal(found, self.bytes_of(key))

    def keep(self, keys: list[str], pages: list[int] | None = None, before=None) -> list[bool]:
        pages = pages or list(range(len(keys)))
        self.fill(keys, pages)
        return self.storage.batch_set_v1(
            keys, self.slots(pages), HiCacheStorageExtraInfo(prefix_keys=before)
        )

    def load(self, keys: list[str], pages: list[int] | None = None) -> int:
        """How many pages come back; checks every byte of these, and that no other page changed."""
        pages = pages or list(range(len(keys)))
        buffer = self.host.kv_buffer
        buffer.fill_(-1)
        done = self.storage.batch_get_v1(keys, self.slots(pages), HiCacheStorageExtraInfo())
        num = sum(done)
        assert done == [True] * num + [False] * (len(keys) - num)
        self.check(keys[:num], pages[:num])
        for page in set(range(self.host.page_num)) - set(pages[:num]):
            assert (self.host.get_data_page(page * self.host.page_size, flat=True) == -1).all()
        return num

    def exists(self, keys: list[str]) -> int:
        """Asked from a thread of HiCache's."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.storage.batch_exists, keys).result()

    def close(self) -> None:
        self.storage.close()


@pytest.fixture
def door(model_folder, monkeypatch):
    opened = []

    def build(kind="mha", layout="page_first", *, model=model_folder, host=None, kv="auto", **more):
        for name in ("LMC_TIERS", "LMC_SALT", "LMC_MODEL_VERSION", "LMC_KERNELS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LMC_RAM_GB", "0.05")
        monkeypatch.setenv("LMC_STAGE_WAIT_MS", "5000")
        settings = {k: more.pop(k) for k in list(more) if k.startswith("LMC_")}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        args = msgspec.structs.replace(SERVER_ARGS, model_path=str(model), kv_cache_dtype=kv)
        monkeypatch.setattr(compat, "server_args", lambda: args)
        host = host or host_pool(kind, layout)
        opened.append(Door(host, settings_of(host, **more)))
        return opened[-1]

    yield build
    for one in opened:
        one.close()


def settings_of(host, **more) -> HiCacheStorageConfig:
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": isinstance(host, MLATokenToKVPoolHost),
        "enable_storage_metrics": False,
        "is_page_first_layout": host.layout == "page_first",
        "model_name": "model",
        "extra_config": dict(EXTRA),
    }
    return HiCacheStorageConfig(**fields | more)


# --- a page comes back


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_pages_come_back_into_other_places(door, kind, layout):
    d, keys = door(kind, layout), chain("a", 12)
    assert d.keep(keys) == [True] * 12
    assert d.exists(keys) == 12
    assert d.load(keys, [20, 3, 31, 0, 7, 9, 8, 2, 30, 29, 28, 11]) == 12
    assert d.load(keys[5:], [1, 2, 3, 4, 5, 6, 7]) == 7


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_k_and_v_may_differ_in_width(door, layout):
    d, keys = door("asymmetric", layout), chain("a", 32)
    for buffer in d.host.kv_buffer:
        buffer.copy_(torch.rand(buffer.shape))
    before = [buffer.clone() for buffer in d.host.kv_buffer]
    every = d.slots(list(range(32)))
    assert all(d.storage.batch_set_v1(keys, every))
    for buffer in d.host.kv_buffer:
        buffer.zero_()
    assert all(d.storage.batch_get_v1(keys, every))
    assert all(map(torch.equal, d.host.kv_buffer, before))


def test_kernels_of_torch_do_as_well(door):
    d, keys = door(LMC_KERNELS="torch"), chain("a", 4)
    assert d.keep(keys) == [True] * 4
    assert d.load(keys, [9, 5, 6, 7]) == 4


def test_only_the_leading_run_counts(door):
    d, keys = door(), chain("a", 8)
    assert all(d.keep(keys[:3]))
    assert all(d.keep(keys[4:6], before=keys[:4]))
    assert d.exists(keys) == 3
    assert d.load(keys) == 3
    assert d.exists(keys[4:]) == 2
    assert d.exists(chain("b", 3)) == 0
    assert d.load(chain("b", 3)) == 0
    assert d.exists([]) == 0
    assert d.storage.exists(keys[4])
    assert not d.storage.exists(keys[3])


def test_pages_that_were_kept_before_stay_what_they_are(door):
    d, keys = door(), chain("a", 8)
    assert all(d.keep(keys[2:5], before=keys[:2]))
    assert d.keep(keys, [9, 8, 7, 6, 5, 4, 3, 2]) == [True] * 8
    assert d.load(keys) == 8


def test_the_second_interface_says_the_same_of_the_pool_it_has(door):
    d, keys = door(), chain("a", 4)
    d.fill(keys, [0, 1, 2, 3])
    slots = d.slots([0, 1, 2, 3])
    kv = PoolTransfer(name=PoolName.KV, keys=keys, host_indices=slots)
    other = PoolTransfer(name=PoolName.SWA, keys=keys, host_indices=slots)
    assert d.storage.batch_set_v2([kv, other]) == {
        PoolName.KV: [True] * 4,
        PoolName.SWA: [False] * 4,
    }
    d.host.kv_buffer.zero_()
    assert d.storage.batch_get_v2([kv]) == {PoolName.KV: [True] * 4}
    d.check(keys, [0, 1, 2, 3])
    longer = chain("a", 6)
    found = d.storage.batch_exists_v2(longer, [PoolTransfer(name=PoolName.KV)])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [1, 2, 3, 4])
    assert found.extra_pool_hit_pages == {PoolName.KV: 4}
    assert d.storage.batch_exists_v2(longer, [other]).kv_hit_pages == 0


def test_sglangs_metrics_hear_of_pages(door):
    d, keys = door(enable_storage_metrics=True), chain("a", 5)
    d.keep(keys)
    d.load(keys[:2])
    metrics = d.storage.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([5], [2])
    assert metrics.backup_bandwidth[0] > 0
    assert d.storage.get_stats().backup_pgs == []


# --- tiers below


def below(tmp_path) -> str:
    return f"file://{tmp_path}?gb=1"


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_pages_come_back_after_a_restart(door, tmp_path, kind, layout):
    keys = chain("a", 10)
    first = door(kind, layout, LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    second = door(kind, layout, LMC_TIERS=below(tmp_path))
    assert second.exists([*keys, *chain("b", 2)]) == 10
    assert second.load(keys) == 10
    third = door(kind, layout, LMC_TIERS=below(tmp_path))
    assert third.load(keys[3:]) == 7, "a page that nobody asked for first is brought up as well"


def test_what_was_used_last_comes_up_by_itself(door, tmp_path):
    keys = chain("a", 6)
    first = door(LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    second = door(LMC_TIERS=below(tmp_path))
    wait_until(lambda: not second.storage.snapshot()["warming"])
    assert second.storage.snapshot()["disk.warmed"] == 6
    assert second.load(keys) == 6
    assert "disk.hit" not in second.storage.snapshot()


DIFFERENCES = {
    "salt": {"LMC_SALT": "another tenant"},
    "version": {"LMC_MODEL_VERSION": "v2"},
    "rank": {"tp_rank": 1, "tp_size": 2},
    "layout": {"layout": "page_first_direct"},
    "dtype": {"kv": "bfloat16"},
}


@pytest.mark.parametrize("what", ["model", *DIFFERENCES])
def test_another_identity_in_the_same_folder_finds_nothing(door, tmp_path, tmp_path_factory, what):
    keys = chain("a", 6)
    first = door(LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    other = {"model": make_model(tmp_path_factory.mktemp("other"), b"other weights")}
    second = door(LMC_TIERS=below(tmp_path), **DIFFERENCES.get(what, other))
    assert second.exists(keys) == 0
    assert second.load(keys) == 0


def test_ranks_of_a_latent_cache_share_what_one_of_them_wrote(door, tmp_path):
    keys = chain("a", 6)
    first = door("mla", tp_rank=0, tp_size=2, LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    assert door("mla", tp_rank=1, tp_size=2, LMC_TIERS=below(tmp_path)).load(keys) == 6


def test_damage_on_disk_is_a_shorter_hit(door, tmp_path):
    keys = chain("a", 6)
    first = door(LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    files = sorted(tmp_path.glob("chunks/*/*"))
    assert len(files) == 6
    blob = bytearray(files[0].read_bytes())
    blob[-5] ^= 1
    files[0].write_bytes(blob)
    second = door(LMC_TIERS=below(tmp_path))
    assert second.exists(keys) == 6, "nobody has looked into it yet"
    assert second.load(keys) < 6
    assert second.exists(keys) < 6
    assert second.storage.snapshot()["disk.miss.checksum"] >= 1


def test_a_tier_that_hangs_is_a_miss(door, tmp_path, monkeypatch):
    """Answers come while the tier still hangs; what RAM has is loaded meanwhile."""
    goes_on = threading.Event()
    first = door(LMC_TIERS=below(tmp_path))
    keys, others = chain("a", 6), chain("b", 6)
    first.keep(keys)
    first.close()

    def hanging(config):
        tiers = [FaultyTier(tier) for tier in open_tiers(config)]
        for verb in ("probe", "read"):
            tiers[0].plan(verb, Fault(hang=goes_on), times=None)
        return tiers

    monkeypatch.setattr("lmc_sglang.hicache.open_tiers", hanging)
    monkeypatch.setattr("lmc.store.TICKET_LIFE_S", 1e9)
    second = door(LMC_TIERS=below(tmp_path), LMC_STAGE_WAIT_MS="50")
    assert second.exists(keys) == 0
    assert second.load(keys) == 0
    assert all(second.keep(others))
    assert second.exists(others) == 6
    assert second.load(others) == 6
    assert not goes_on.is_set()
    goes_on.set()


def test_the_scheduler_is_promised_all_that_came_up_for_it(door, tmp_path):
    keys = chain("a", 10)
    first = door(LMC_TIERS=below(tmp_path))
    first.keep(keys)
    first.close()
    second = door(LMC_TIERS=below(tmp_path), LMC_RAM_GB=small(20), LMC_STAGE_WAIT_MS="5000")
    assert second.storage.batch_exists(keys) == 10


def test_a_change_of_weights_while_a_query_waits(door, tmp_path, monkeypatch):
    first = door(LMC_TIERS=below(tmp_path))
    keys = chain("a", 6)
    first.keep(keys)
    first.close()
    second = door(LMC_TIERS=below(tmp_path))
    second.load(keys[:3])
    wait = second.storage._pages._wait_for

    def overtaken(*args, **kwargs):
        wait(*args, **kwargs)
        second.storage.weights_changed()

    monkeypatch.setattr(second.storage._pages, "_wait_for", overtaken)
    assert second.exists([*keys, *chain("b", 1)]) == 0


def test_a_query_does_not_wait_for_what_it_finds(door, tmp_path, monkeypatch):
    """What is there is told by a probe, and on its way up from then on."""
    goes_on = threading.Event()
    first = door(LMC_TIERS=below(tmp_path))
    keys = chain("a", 6)
    first.keep(keys)
    first.close()

    def slow(config):
        tiers = [FaultyTier(tier) for tier in open_tiers(config)]
        tiers[0].plan("hottest", Fault(lose=True), times=None)
        tiers[0].plan("read", Fault(hang=goes_on), times=None)
        return tiers

    monkeypatch.setattr("lmc_sglang.hicache.open_tiers", slow)
    second = door(LMC_TIERS=below(tmp_path), LMC_STAGE_WAIT_MS="5000")
    assert second.exists(keys) == 6
    assert second.storage.batch_exists(chain("b", 3)) == 0, "the scheduler's thread is not held up"
    goes_on.set()
    wait_until(lambda: second.storage.snapshot()["staged_slots"] == 6)
    assert second.load(keys) == 6
    assert second.storage.snapshot()["staged_slots"] == 0
    assert second.storage.snapshot()["disk.hit"] == 6


# --- promises


def num_slots(d) -> int:
    return d.store.arena.num_slots


def small(num_pages: int, d_bytes: int = 2 * LAYERS * 64 * 2 * 32 * 4) -> str:
    return str(num_pages * (d_bytes + 4096) / 1e9)


def test_what_was_said_to_be_there_stays_until_it_is_loaded(door):
    d, keys = door(LMC_RAM_GB=small(20)), chain("a", 8)
    assert num_slots(d) == 20
    d.keep(keys)
    assert d.exists(keys) == 8
    for name in "bcdef":
        d.keep(chain(name, 12))
    assert d.store.ram.evictions > 0
    assert d.load(keys) == 8
    for name in "ghij":
        d.keep(chain(name, 12))
    assert d.load(keys) < 8, "then it may go"


def test_promises_end(door, monkeypatch):
    monkeypatch.setattr(page_store, "PROMISE_S", 0.0)
    d, keys = door(LMC_RAM_GB=small(20)), chain("a", 8)
    d.keep(keys)
    assert d.exists(keys) == 8
    assert all(d.keep(chain("b", 20)))


def test_the_scheduler_is_promised_no_more_than_stays(door):
    """Half of RAM is pinned at most. A background thread is told of all that is there."""
    d, keys = door(LMC_RAM_GB=small(20)), chain("a", 15)
    d.keep(keys)
    assert d.exists(keys) == 15
    assert d.storage.batch_exists(keys[5:]) == 0
    assert d.load(keys) == 15
    assert d.storage.batch_exists(keys) == 10


# --- threads, weights, life


@pytest.mark.parametrize("op", ["gather", "scatter"])
def test_others_take_their_turns_while_a_copy_runs(door, monkeypatch, op):
    """And what they do to a full RAM leaves alone what the copy reads or writes."""
    d, keys = door(LMC_RAM_GB=small(20)), chain("a", 8)
    real, others = getattr(page_store, op), iter("bcdef")

    def beside(*args, **kwargs):
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as thread:
            patch.setattr(page_store, op, real)
            for name in others:
                thread.submit(d.keep, chain(name, 12), list(range(20, 32))).result()
        real(*args, **kwargs)

    if op == "scatter":
        d.keep(keys)
    monkeypatch.setattr(page_store, op, beside)
    if op == "gather":
        assert all(d.keep(keys))
    buffer = d.host.kv_buffer
    buffer.fill_(-1)
    assert all(d.storage.batch_get_v1(keys, d.slots(list(range(8)))))
    d.check(keys, list(range(8)))
    assert d.store.ram.evictions > 0


def test_threads_take_turns(door, tmp_path):
    """Two that store, two that load and ask, one that looks; less room than all of it."""
    d = door(LMC_RAM_GB=small(40), LMC_TIERS=below(tmp_path))
    sequences = [chain(str(n), 10) for n in range(12)]
    places = [list(range(8 * n, 8 * n + 8)) for n in range(4)]
    wrong: list[str] = []

    def work(n: int) -> int:
        loaded = 0
        for i in range(40):
            keys = sequences[(n + i * 5) % 12][:8]
            if n < 2:
                d.keep(keys, places[n])
            else:
                found = d.storage.batch_exists(keys)
                done = d.storage.batch_get_v1(keys, d.slots(places[n]))
                loaded += sum(done)
                d.check(keys[: sum(done)], places[n][: sum(done)])
                if found > len(keys):
                    wrong.append("more than was asked for")
            d.storage.snapshot()
        return loaded

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(4)))
    assert sum(results) > 0
    assert wrong == []
    for sequence in sequences:
        d.load(sequence)
    with d.storage._pages._turn:
        d.storage._pages._break_promises()
        assert d.store.drain(10)
        d.store.ram.check()


def test_after_a_change_of_weights_nothing_is_kept_until_the_tree_was_flushed(door, tmp_path):
    d, keys = door(LMC_TIERS=below(tmp_path)), chain("a", 6)
    d.keep(keys)
    assert d.exists(keys) == 6
    d.storage.weights_changed()
    assert d.exists(keys) == 0
    assert d.keep(keys) == [False] * 6, "these may be pages of the weights that are no more"
    assert d.exists(keys) == 0
    d.storage.tree_flushed()
    assert all(d.keep(keys))
    assert d.load(keys) == 6
    d.close()
    assert len(list(tmp_path.glob("chunks/*/*"))) <= 6


def test_pages_on_their_way_when_weights_change_are_not_kept(door, monkeypatch):
    d, keys = door(), chain("a", 6)
    real = page_store.gather

    def overtaken(*args, **kwargs):
        real(*args, **kwargs)
        d.storage.weights_changed()
        d.storage.tree_flushed()

    monkeypatch.setattr(page_store, "gather", overtaken)
    assert d.keep(keys) == [False] * 6
    assert d.exists(keys) == 0
    d.store.ram.check()


def test_clear_forgets_everything(door):
    d, keys = door(), chain("a", 6)
    d.keep(keys)
    d.storage.clear()
    assert d.exists(keys) == 0
    assert all(d.keep(keys))
    assert d.load(keys) == 6


def test_a_copy_that_fails_keeps_nothing(door, monkeypatch):
    d, keys = door(), chain("a", 6)
    with monkeypatch.context() as patch:
        patch.setattr(page_store, "gather", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            d.keep(keys)
    assert d.exists(keys) == 0
    assert all(d.keep(keys))


def test_after_the_end_everything_is_a_miss(door):
    d, keys = door(), chain("a", 6)
    d.keep(keys)
    d.close()
    assert d.exists(keys) == 0
    assert d.load(keys) == 0
    assert d.keep(keys) == [False] * 6
    d.storage.clear()
    d.close()


# --- refused at start, by name


REFUSED = {
    "page": (lambda: host_pool("mha", "page_first", page=16), {}, "--page-size must be at least"),
    "layout": (lambda: host_pool("mha", "page_head"), {}, "--hicache-mem-layout page_head"),
    "class": (lambda: type("Mine", (MHATokenToKVPoolHost,), {}), {}, "this pool under HiCache"),
    "values": (None, {"extra_config": {**EXTRA, "interface_v1": 0}}, '"interface_v1": 1'),
    "options": (None, {"extra_config": {**EXTRA, "ram_gb": 3}}, "ram_gb"),
    "context": (None, {"attn_cp_size": 2}, "attn_cp_size=2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_served_is_named(door, what):
    make, settings, message = REFUSED[what]
    host = make() if make else host_pool("mha", "page_first")
    if what == "class":
        kind, host = host, host_pool("mha", "page_first")
        host.__class__ = kind
    with pytest.raises(ValueError, match=message):
        door(host=host, **settings)


def test_a_latent_cache_on_several_ranks_needs_a_place_that_all_reach(door):
    with pytest.raises(ValueError, match="LMC_TIERS: with MLA on 2 ranks"):
        door("mla", tp_rank=1, tp_size=2)


def test_pools_beside_the_kv_are_named(door):
    d = door()
    with pytest.raises(ValueError, match=r"the pool swa .*MLATokenToKVPoolHost"):
        d.storage.register_mem_host_pool_v2(host_pool("mla", "page_first"), PoolName.SWA)


def test_draft_layers_are_named(door):
    host = host_pool("mha", "page_first")
    host.target_layer_num -= 1
    with pytest.raises(ValueError, match="draft layers"):
        door(host=host)


def test_runs_that_are_not_where_they_should_be_are_named(door):
    host = host_pool("mha", "page_first")
    real = host.get_page_buffer_meta
    host.get_page_buffer_meta = lambda indices: (
        real(indices)[0],
        [size // 2 for size in real(indices)[1]],
    )
    with pytest.raises(ValueError, match="bytes a page for"):
        door(host=host)


def test_a_misspelt_setting_is_named(door):
    with pytest.raises(ValueError, match="did you mean LMC_TIERS"):
        door(LMC_TIER="file:///x")


# --- SGLang


def test_this_sglang_is_the_one_the_door_knows():
    compat.check_hicache()


def test_what_changed_in_hicache_is_named(monkeypatch):
    target = f"{compat._HICACHE}.reset"
    monkeypatch.setitem(compat.HICACHE_SIGNATURES, target, ("self", "hard"))
    with pytest.raises(RuntimeError, match=r"HiCacheController\.reset\(self\)"):
        compat.check_hicache()


@pytest.mark.parametrize("target", compat.WEIGHT_CHANGES)
def test_every_way_to_change_weights_starts_a_generation(door, target):
    from pkgutil import resolve_name

    d = door()
    before = d.store.namespace
    with pytest.raises((AttributeError, TypeError)):
        resolve_name(target)(object())
    assert d.store.namespace != before


def test_the_servers_state_shows_the_storage(door):
    d = door()
    d.keep(chain("a", 3))
    output = SimpleNamespace(internal_state={})
    compat._on_internal_state(lambda *_: output)
    assert output.internal_state["lmc"]["ram.stored"] == 3


@pytest.mark.parametrize("below_hicache", [False, True])
def test_the_line_that_says_why_the_linker_is_off_tells_of_this_door(below_hicache, caplog):
    caplog.set_level("INFO", "lmc")
    extra = '{"module_path": "lmc_sglang.hicache"}' if below_hicache else None
    args = SimpleNamespace(
        enable_unified_cache_external_linker=False,
        disable_radix_cache=False,
        radix_cache_backend=None,
        enable_hierarchical_cache=True,
        hicache_storage_backend=None,
        hicache_storage_backend_extra_config=extra,
        enable_lmcache=False,
        pp_size=1,
        attn_cp_size=1,
        dcp_size=1,
        **dict.fromkeys(compat.EXCLUSIVE_FLAGS.values(), False),
    )
    switch._declare_linker(args, lambda **_: pytest.fail("declared"))
    (line,) = caplog.messages
    assert ("is the storage of HiCache" if below_hicache else "lmc_sglang.hicache") in line
