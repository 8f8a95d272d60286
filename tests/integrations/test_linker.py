"""The linker against SGLang's real cache: what was computed once comes back byte for byte, or not
at all.
"""

from __future__ import annotations

import shutil
import time

import pytest
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from tests.integrations.fixtures import make_model
from tests.integrations.harness import DIM, HEADS, LAYERS, LAYOUTS, Request, tokens

CHUNK_BYTES = 4096 + 2 * LAYERS * HEADS * DIM * 4 * 256


@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("length", [2048, 2050, 4091])
def test_a_repeated_prompt_recomputes_at_most_a_step(harness, page, length):
    h = harness(page)
    ids = tokens(1, length)
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    assert length - h.run(ids) <= max(page, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(harness, layout):
    h = harness(layout=layout)
    ids = tokens(1, 1500)
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    assert h.run(ids[:1100] + tokens(2, 400)) == 1088


@pytest.mark.parametrize("page", [1, 16, 64])
def test_a_prompt_that_diverges_in_a_chunk_reuses_the_pages_before(harness, page):
    h = harness(page)
    ids = tokens(1, 1500)
    h.run(ids)
    h.settle()
    h.flush()
    other = ids[:1100] + tokens(2, 400)
    assert 1100 - h.run(other) < max(page, 16)


def test_each_turn_of_a_chat_reuses_the_turn_before(harness):
    h = harness()
    chat = tokens(1, 300)
    for turn in range(6):
        h.settle()
        h.flush()
        before = len(h.whole(chat)) if turn else 0
        chat = chat + tokens(10 + turn, 170)
        assert h.run(chat) == before


def test_a_prefix_that_stays_on_the_device_is_hot_in_ram(harness):
    """Other prompts fill RAM several times over while the system prompt is only ever hit on the
    device.
    """
    h = harness(LMC_RAM_GB=str(16 * CHUNK_BYTES / 1e9))
    system = tokens(1, 1024)
    for seed in range(2, 30):
        h.run(system + tokens(seed, 512))
        h.settle()
    assert h.store.ram.evictions > 16
    h.flush()
    assert h.run(system + tokens(99, 512)) >= 1024


def test_chunks_come_back_from_disk_in_a_new_process(harness, tmp_path):
    ids = tokens(1, 4091)
    first = harness(LMC_TIERS=f"file://{tmp_path}?gb=1")
    first.run(ids)
    first.settle()
    first.close()
    second = harness(cold=True, LMC_TIERS=f"file://{tmp_path}?gb=1")
    assert 4091 - second.run(ids) <= 64


def test_chunks_come_up_by_themselves_in_a_new_process(harness, tmp_path):
    ids = tokens(1, 4091)
    place = f"file://{tmp_path}?gb=1"
    first = harness(LMC_TIERS=place)
    first.run(ids)
    first.settle()
    first.close()
    second = harness(LMC_TIERS=place)
    assert second.store.drain(10)
    assert (
        second.store.lookup(second.linker.lanes[0].steps(digests_of(ids, 64), 0)[1]) == 4091 // 64
    )
    second.store._guards[0]._tier.read = None  # the request needs the disk no more
    assert 4091 - second.run(ids) <= 64


def test_a_prompt_is_found_on_disk_after_its_answer_completed_the_chunk(harness, tmp_path):
    """The tail of the prompt was replaced by the chunk that the answer filled: its name still leads
    there.
    """
    prompt = tokens(1, 450)
    first = harness(LMC_TIERS=f"file://{tmp_path}?gb=1")
    first.run(prompt)
    first.settle()
    first.run(prompt + tokens(2, 150))
    first.settle()
    first.close()
    second = harness(LMC_TIERS=f"file://{tmp_path}?gb=1")
    assert second.run(prompt) == 448


@pytest.mark.parametrize("what", ["model", "page", "salt", "version"])
def test_another_identity_in_the_same_folder_finds_nothing(
    harness, tmp_path, tmp_path_factory, what
):
    ids = tokens(1, 1000)
    place = f"file://{tmp_path}?gb=1"
    first = harness(LMC_TIERS=place)
    first.run(ids)
    first.settle()
    first.close()
    changes = {
        "model": {
            "model": make_model(tmp_path_factory.mktemp("other"), b"weights of the other model")
        },
        "page": {"page": 16},
        "salt": {"LMC_SALT": "another tenant"},
        "version": {"LMC_MODEL_VERSION": "v2"},
    }
    second = harness(LMC_TIERS=place, **changes[what])
    assert second.run(ids) == 0
    again = harness(LMC_TIERS=place)
    assert again.run(ids) == 960


def test_salts_and_extra_keys_do_not_share(harness):
    h = harness()
    ids = tokens(1, 600)
    h.run(ids, cache_salt="a")
    h.settle()
    h.flush()
    assert h.run(ids, cache_salt="b") == 0
    assert h.run(ids, extra_key="a") == 0
    assert h.run(ids) == 0
    h.settle()
    h.flush()
    assert h.run(ids, cache_salt="a") == 576


@pytest.mark.parametrize("length", [0, 1, 15, 63, 64])
def test_prompts_shorter_than_a_page(harness, length):
    h = harness()
    for _ in range(2):
        assert h.run(tokens(1, max(length, 1))) == 0
    h.linker.request_arrived(Request("empty", tokens(1, 0)))
    h.settle()
    h.store.ram.check()


def test_a_prompt_longer_than_ram_keeps_its_beginning(harness):
    h = harness(LMC_RAM_GB=str(4 * CHUNK_BYTES / 1e9))
    ids = tokens(1, 4000)
    h.run(ids)
    h.settle()
    h.flush()
    kept = h.run(ids)
    assert 512 <= kept <= 4 * 256
    h.store.ram.check()


def test_a_full_ram_of_held_chunks_stores_nothing_and_fails_nobody(harness):
    h = harness(LMC_RAM_GB=str(4 * CHUNK_BYTES / 1e9))
    ids = tokens(1, 1100)
    h.run(ids)
    h.settle()
    h.flush()
    held = h.store.acquire(h.linker.lanes[0].steps(digests_of(ids, 64), 0)[1])
    for seed in range(2, 6):
        assert h.run(tokens(seed, 1000)) == 0
        h.settle()
    held.release()
    h.flush()
    assert h.run(ids) >= 512
    h.store.ram.check()


# --- requests that go away


def test_a_request_aborted_after_its_promise(harness):
    h = stored(harness, 1000)
    req = h.arrive(tokens(1, 1000))
    assert h.match(req).host_hit_length == 960
    h.cache.linker.release_request(req.rid)
    assert_nothing_held(h)


def test_a_promise_nobody_takes_up_ends_with_the_pass(harness):
    h = stored(harness, 1000)
    req = h.arrive(tokens(1, 1000))
    h.match(req)
    h.step()
    assert_nothing_held(h)


def test_a_request_aborted_while_its_load_is_queued(harness):
    h = stored(harness, 1000)
    req = h.arrive(tokens(1, 1000))
    match = h.match(req)
    req.last_node = match.last_device_node
    h.cache.init_load_back(
        InitLoadBackParams(
            best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=req
        )
    )
    h.cache.linker.release_request(req.rid)
    assert h.cache.ready_to_load_host_cache() == -1
    assert_nothing_held(h)


def test_a_request_aborted_while_staging(harness, tmp_path):
    place = f"file://{tmp_path}?gb=1"
    stored(harness, 1000, LMC_TIERS=place).close()
    h = harness(LMC_TIERS=place)
    req = h.arrive(tokens(1, 1000))
    h.cache.linker.release_request(req.rid)
    assert h.store.drain(10)
    assert_nothing_held(h)


def test_a_flush_during_a_store_keeps_what_was_copied(harness):
    h = harness()
    ids = tokens(1, 2000)
    h.run(ids)
    h.reset()  # copies still under way
    assert_nothing_held(h)
    assert 2000 - h.run(ids) <= 64


def test_a_flush_while_a_load_is_under_way(harness):
    h = stored(harness, 1000)
    req = h.arrive(tokens(1, 1000))
    h.load_back(req, h.match(req))
    h.reset()
    assert_nothing_held(h)
    assert h.run(tokens(1, 1000)) == 960


def test_what_the_disk_acknowledged_is_there_after_a_stop_amid_a_spill(harness, tmp_path):
    """The process goes with writes still queued: files are whole or absent."""
    place = f"file://{tmp_path}?gb=1"
    h = harness(LMC_TIERS=place)
    h.run(tokens(1, 4000))
    h.settle()
    h.store._guards[0].close(0.0)
    files = len(list(tmp_path.glob("chunks/*/*")))
    again = harness(cold=True, LMC_TIERS=place)
    again.run(tokens(1, 4000))
    found = again.store.snapshot()
    assert not [name for name in found if name.startswith("disk.miss")]
    assert found.get("disk.hit", 0) <= files


# --- weights that change in place


def test_nothing_is_found_after_the_weights_changed(harness, tmp_path):
    place = f"file://{tmp_path}?gb=1"
    h = stored(harness, 1000, LMC_TIERS=place)
    h.linker.weights_changed()
    h.flush()
    assert h.run(tokens(1, 1000)) == 0
    h.settle()
    h.flush()
    assert h.run(tokens(1, 1000)) == 960, "the new weights' own chunks"
    assert h.store.drain(10)
    files = len(list(tmp_path.glob("chunks/*/*")))
    h.run(tokens(2, 1000))
    h.settle()
    assert h.store.drain(10)
    assert len(list(tmp_path.glob("chunks/*/*"))) == files, (
        "a generation without a name stays in this process"
    )


def test_weights_changed_without_a_flush_keep_the_old_tree_out(harness):
    h = stored(harness, 500)
    h.run(tokens(1, 500))
    h.linker.weights_changed()
    h.run(tokens(1, 500) + tokens(3, 500))  # on top of the old weights' KV
    h.settle()
    h.flush()
    assert h.run(tokens(1, 500) + tokens(3, 500)) == 0


def test_weights_changed_while_a_store_is_under_way(harness):
    h = harness()
    h.run(tokens(1, 1000))
    h.linker.weights_changed()
    h.settle()
    h.flush()
    assert h.run(tokens(1, 1000)) == 0


# --- damage below


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "gone", "folder"])
def test_damage_on_disk_is_a_shorter_hit(harness, tmp_path, damage):
    place = f"file://{tmp_path}?gb=1"
    ids = tokens(1, 2000)
    stored(harness, 2000, LMC_TIERS=place).close()
    files = sorted(tmp_path.glob("chunks/*/*"))
    if damage == "flip":
        raw = bytearray(files[0].read_bytes())
        raw[5000] ^= 4
        files[0].write_bytes(raw)
    elif damage == "cut":
        files[0].write_bytes(files[0].read_bytes()[:6000])
    elif damage == "swap":
        one, other = files[0].read_bytes(), files[1].read_bytes()
        files[0].write_bytes(other)
        files[1].write_bytes(one)
    elif damage == "gone":
        files[0].unlink()
    h = harness(LMC_TIERS=place)
    if damage == "folder":
        shutil.rmtree(tmp_path / "chunks")
    assert h.run(ids) < 1984
    h.settle()
    assert h.store.drain(10)
    again = harness(LMC_TIERS=place)
    assert again.run(ids) == 1984, "stored again"


def stored(harness, length: int, **settings):
    """A harness that has stored prompt 1 and flushed its device."""
    h = harness(**settings)
    h.run(tokens(1, length))
    h.settle()
    h.flush()
    return h


def assert_nothing_held(h) -> None:
    h.store.ram.check()
    assert h.store.snapshot()["staged_slots"] == 0
    assert not any(h.store.ram._pins)


def digests_of(ids, page: int) -> list[str]:
    return get_storage_hash_str(RadixKey(h_ids(ids, page)), None, page_size=page)


def h_ids(ids, page: int):
    return ids[: len(ids) // page * page]


def test_what_is_remembered_of_requests_does_not_grow(harness, monkeypatch):
    """A request that was never loaded, aborted or looked up again is forgotten with its ticket."""
    monkeypatch.setattr("lmc.store.TICKET_LIFE_S", 0.0)
    h = harness()
    for seed in range(50):
        h.run(tokens(seed, 200))
        h.settle()
    assert len(h.linker._arrivals) <= 2


def test_a_request_aborted_while_it_loads(harness):
    """SGLang finishes a load that has started before it frees anything; then nothing is held."""
    h = stored(harness, 1000)
    req = h.arrive(tokens(1, 1000))
    match = h.match(req)
    req.last_node = match.last_device_node
    h.cache.init_load_back(
        InitLoadBackParams(
            best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=req
        )
    )
    assert h.cache.ready_to_load_host_cache() >= 0
    h.cache.linker.release_request(req.rid)
    assert h.cache.linker.finish_loads() == []
    assert_nothing_held(h)
    assert h.run(tokens(1, 1000)) == 960


def test_a_request_aborted_while_it_stores(harness):
    """Its pages stay locked until they are copied; what was copied is whole."""
    h = harness()
    h.run(tokens(1, 1000))
    h.cache.linker.release_request("r1")
    h.settle()
    assert_nothing_held(h)
    h.flush()
    assert h.run(tokens(1, 1000)) == 960


def test_a_copy_that_fails_fails_nobody(harness, monkeypatch):
    """Storing: not kept. Loading cannot fail for I/O reasons; if the copy itself does, SGLang is
    told.
    """
    h = harness()
    backend = type(h.linker._copier._backend)

    def broken(*_: object) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "gather", broken)
        h.run(tokens(1, 1000))
        h.settle()
    assert h.store.snapshot()["offload.lost"] == 1
    h.flush()
    assert h.run(tokens(1, 1000)) == 0
    h.settle()
    h.flush()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "scatter", broken)
        req = h.arrive(tokens(1, 1000))
        match = h.match(req)
        h.load_back(req, match)
        assert h.cache.linker.finish_loads() == [req.rid]
    assert_nothing_held(h)


def test_a_weight_update_session_leaves_lmc_on(harness):
    """SGLang flushes inside the session and ends it afterwards: the tree is empty by then."""
    h = stored(harness, 1000)
    h.run(tokens(1, 1000))
    h.linker.weights_changed()  # begin
    h.linker.weights_changed()  # update
    h.flush()
    h.linker.weights_changed()  # end
    assert h.run(tokens(1, 1000)) == 0
    h.settle()
    h.flush()
    assert h.run(tokens(1, 1000)) == 960


def test_requests_that_need_nothing_do_not_hold_up_staging(harness, tmp_path, monkeypatch):
    """Staged for nothing, never looked up: the next request does not wait, and has room in time."""
    monkeypatch.setattr("lmc.store.TICKET_LIFE_S", 0.2)
    place = f"file://{tmp_path}?gb=1"
    for seed in (1, 2):
        first = harness(LMC_TIERS=place)
        first.run(tokens(seed, 1100))
        first.settle()
        first.close()
    h = harness(cold=True, LMC_TIERS=place, LMC_RAM_GB=str(8 * CHUNK_BYTES / 1e9))
    idle = h.arrive(tokens(1, 1100))
    h.store.settle(h.linker._arrivals[idle.rid].tickets[0], 5)
    req = h.arrive(tokens(2, 1100))
    started = time.monotonic()
    h.match(req)
    assert time.monotonic() - started < 2, "there is no room, and waiting makes none"
    time.sleep(0.3)
    h.step()
    assert h.run(tokens(2, 1100)) >= 1024
