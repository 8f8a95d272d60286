"""Adapters whose files change: what comes back is what the workers computed with, or nothing.

Workers read, keep and evict adapters by vLLM's own code; what they compute hangs on what they read.
"""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

import lmc_vllm.adapters
from tests.integrations.vllm import adapters
from tests.integrations.vllm.adapters import adapter, write
from tests.integrations.vllm.fake import full, mamba, prompt, sliding

IDS = prompt(1, 300)
WORLDS = {
    "one": {},
    "ranks": {"tp": 2},
    "stages": {"pp": 2, "late": "all"},
    "ahead": {"overlap": True, "late": "all"},
}


@pytest.fixture
def lora_engine(engine):
    return lambda specs=None, **options: engine(specs, **{"loras": True, **options})


def test_adapters_are_told_apart_by_their_weights(lora_engine, tmp_path):
    one, first = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=first)
    assert one.again([IDS]) == [300]
    assert one.again([IDS], lora_request=first) == [12]
    assert one.again([IDS], lora_request=adapter(tmp_path / "b", b"others!", 2)) == [300]
    assert one.again([IDS], lora_request=first) == [12]


@pytest.mark.parametrize(
    "change", [{}, {"weights": b"others!"}, {"lora_alpha": 16}, {"is_3d_lora_weight": True}]
)
def test_an_adapter_is_found_again_in_a_new_process_if_it_is_the_same(
    lora_engine, tmp_path, change
):
    place = f"file://{tmp_path / 'tier'}?gb=1"
    first = lora_engine(LMC_TIERS=place)
    first.run([IDS], lora_request=adapter(tmp_path / "a", b"weights"))
    first.close()
    more = {n: change.pop(n) for n in list(change) if n == "is_3d_lora_weight"}
    lora = adapter(tmp_path / "a", b"", **more)
    write(tmp_path / "a", change.pop("weights", b"weights"), **change)
    same = not more and (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == b"weights"
    same = same and json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == (
        adapters.CONFIG
    )
    assert lora_engine(LMC_TIERS=place).run([IDS], lora_request=lora) == [12 if same else 300]


@pytest.mark.parametrize("world", WORLDS)
def test_overwritten_between_the_first_request_and_the_load(lora_engine, tmp_path, world):
    one = lora_engine(**WORLDS[world])
    lora = adapter(tmp_path / "a", b"weights")
    name = one.ask(IDS, 40, lora_request=lora)
    wait_for_look(one, name)
    write(tmp_path / "a", b"others!")
    one.finish(name)
    one.settle()
    assert one.again([IDS], lora_request=lora) == [300], "kept under the new name only from now on"
    assert one.again([IDS], lora_request=lora) == [12]
    write(tmp_path / "a", b"weights")
    assert lora_engine(**WORLDS[world]).run([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [300], "nobody knows what is loaded next"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("slow", [False, True])
def test_read_again_after_an_eviction_with_other_bytes(lora_engine, tmp_path, world, slow):
    """One adapter fits: another one evicts it. Nothing of either contents is found by the other,
    not even stores that end long after.
    """
    one = lora_engine(**WORLDS[world])
    lora, other = adapter(tmp_path / "a", b"weights"), adapter(tmp_path / "b", b"!", 2)
    one.run([IDS], lora_request=lora)
    assert one.again([IDS], lora_request=lora) == [12]
    one.run([prompt(2, 50)], lora_request=other)
    write(tmp_path / "a", b"others!")
    one.forget()
    for copies in one.copies:
        copies.may_store.clear() if slow else None
    name = one.ask(IDS, 60, lora_request=lora)
    one.finish(name)
    assert one.computed[name] == 359
    for copies in one.copies:
        copies.may_store.set()
    one.settle()
    assert one.again([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [12]


def test_a_slow_store_of_what_was_loaded_for_a_while_only(lora_engine, tmp_path):
    """The store ends when the worker has again what it was thought to have all the time."""
    one = lora_engine()
    lora, other = adapter(tmp_path / "a", b"weights"), adapter(tmp_path / "b", b"!", 2)
    one.run([prompt(2, 50)], lora_request=lora)
    one.run([prompt(2, 50)], lora_request=other)
    one.copies[0].may_store.clear()
    name = one.ask(IDS, 30, lora_request=lora)
    wait_for_look(one, name)
    write(tmp_path / "a", b"others!")
    one.until(lambda: len(one.said[name]) > 3)  # the file was read again
    one.abort(name)
    one.lmc._early.clear()  # else the next step waits for what is stored at the end
    one.lmc._savings = {n: s for n, s in one.lmc._savings.items() if not s.fenced}
    write(tmp_path / "a", b"weights")
    one.core.add_lora(lora_in_place(lora))
    one.copies[0].may_store.set()
    one.settle()
    assert one.again([IDS], lora_request=lora) == [300]


def test_what_is_loaded_counts_while_the_files_are_others(lora_engine, tmp_path):
    """The worker has the adapter still: the new files are not what it computes with."""
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=lora)
    write(tmp_path / "a", b"others!")
    assert one.again([IDS], lora_request=lora) == [300]
    write(tmp_path / "a", b"weights")
    assert one.again([IDS], lora_request=lora) == [12]


def test_blocks_vllm_has_of_earlier_contents_are_not_kept(lora_engine, tmp_path):
    one = lora_engine()
    lora, other = adapter(tmp_path / "a", b"weights"), adapter(tmp_path / "b", b"!", 2)
    one.run([IDS], lora_request=lora)
    one.run([prompt(2, 50)], lora_request=other)
    write(tmp_path / "a", b"others!")
    one.run([prompt(3, 50)], lora_request=lora)  # reads it again
    name = one.ask(IDS + prompt(4, 100), 30, lora_request=lora)
    one.mixed.add(name)
    one.finish_somehow(name)
    assert one.computed[name] < 200, "vLLM found its own blocks"
    one.settle()
    assert one.again([IDS + prompt(4, 100)], lora_request=lora) == [400]
    assert one.again([IDS + prompt(4, 100)], lora_request=lora) == [1]


def test_another_number_for_the_same_name_and_path(lora_engine, tmp_path):
    """As after unloading an adapter and loading it again: vLLM's blocks are called the same."""
    one = lora_engine()
    one.run([IDS], lora_request=adapter(tmp_path / "a", b"weights"))
    again = adapter(tmp_path / "a", b"others!", 2)
    name = one.ask(IDS + prompt(4, 100), lora_request=again)
    one.mixed.add(name)
    one.finish_somehow(name)
    assert one.computed[name] < 200, "vLLM found its own blocks"
    one.settle()
    assert one.again([IDS + prompt(4, 100)], lora_request=again) == [400]


def test_another_number_whose_blocks_are_on_their_way(lora_engine, tmp_path):
    """The second request begins on blocks of the first before anybody knows what these are of."""
    one = lora_engine(overlap=True, arguments={"max_loras": 2})
    first = adapter(tmp_path / "a", b"weights")
    name = one.ask(IDS, lora_request=first)
    wait_for_look(one, name)
    one.until(lambda: one.computed[name])
    again = adapter(tmp_path / "a", b"others!", 2)
    second = one.ask(IDS + prompt(4, 100), 40, lora_request=again)
    wait_for_look(one, second)
    assert not one.lmc._adapters._loaded, "the scheduler has not heard of the first load"
    one.mixed.add(second)
    one.finish(name)
    one.finish_somehow(second)
    assert one.computed[second] < 200, "vLLM found its own blocks"
    one.settle()
    assert one.again([IDS + prompt(4, 100)], lora_request=again) == [400]


def test_once_vllms_cache_is_empty_earlier_contents_are_forgotten(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=lora)
    write(tmp_path / "a", b"others!")
    one.core.add_lora(lora_in_place(lora))
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    one.run([IDS], lora_request=lora)
    one.run([IDS + prompt(4, 100)], lora_request=lora)  # on vLLM's own blocks
    assert one.again([IDS + prompt(4, 100)], lora_request=lora) == [1]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "specs", [full(4), sliding(4, 100), mamba(4, "align")], ids=["full", "windows", "states"]
)
def test_changed_in_place_while_requests_run(lora_engine, tmp_path, specs, world):
    options = {"blocks": 400} | WORLDS[world]
    if "layers.0.mixer" in specs:
        options |= {"block": 64, "mamba_mode": "align"}
    one = lora_engine(specs, **options)
    lora = adapter(tmp_path / "a", b"weights")
    names = [one.ask(prompt(seed, 300), 60, lora_request=lora) for seed in (1, 2)]
    one.until(lambda: all(len(one.said[name]) > 20 for name in names))
    one.mixed.update(names)
    assert one.core.add_lora(adapter(tmp_path / "a", b"others!", load_inplace=True))
    one.finish_somehow(*names)
    one.settle()
    plain = adapter(tmp_path / "a", b"others!")
    for seed in (1, 2):
        assert one.again([prompt(seed, 300)], lora_request=plain) == [300]
        assert one.again([prompt(seed, 300)], lora_request=plain)[0] <= 300 % 64


def test_changed_in_place_by_a_call(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=lora)
    assert one.core.add_lora(adapter(tmp_path / "a", b"others!", load_inplace=True))
    assert one.again([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [12]


def test_another_path_under_the_same_number_for_a_while(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    name = one.ask(IDS, 200, lora_request=lora)
    one.mixed.add(name)
    one.until(lambda: len(one.said[name]) > 5)
    write(tmp_path / "b", b"others!")
    for path, count in ((tmp_path / "b", 60), (tmp_path / "a", 200)):
        one.core.add_lora(LoRARequest(lora.lora_name, 1, str(path), load_inplace=True))
        one.until(lambda: len(one.said[name]) >= count)  # noqa: B023
    one.settle()
    ids = IDS + one.said[name]
    assert one.again([ids], lora_request=lora)[0] > 190
    one.again([ids], lora_request=lora)  # on what that one added, and nothing else


@pytest.mark.parametrize("world", WORLDS)
def test_loaded_by_a_call_long_before_the_first_request(lora_engine, tmp_path, world):
    """What a worker has counts, also if nothing ran since and the files are others by now."""
    place = f"file://{tmp_path / 'tier'}?gb=1"
    first = lora_engine(LMC_TIERS=place, **WORLDS[world])
    first.run([IDS], lora_request=adapter(tmp_path / "a", b"others!"))
    first.close()
    one = lora_engine(LMC_TIERS=place, **WORLDS[world])
    lora = adapter(tmp_path / "a", b"weights")
    assert one.core.add_lora(lora)
    write(tmp_path / "a", b"others!")
    name = one.ask(IDS, lora_request=lora)
    wait_for_look(one, name)
    one.finish(name)
    assert one.computed[name] == 300
    same = lora_engine(LMC_TIERS=place, **WORLDS[world])
    assert same.core.add_lora(lora)
    assert same.run([IDS], lora_request=lora) == [12]


def test_a_folder_that_vanishes(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=lora)
    shutil.rmtree(tmp_path / "a")
    assert one.again([IDS], lora_request=lora) == [300]
    adapter(tmp_path / "a", b"weights")
    assert one.again([IDS], lora_request=lora) == [12]


def test_a_folder_that_appears_late(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    shutil.rmtree(tmp_path / "a")
    name = one.ask(IDS, lora_request=lora)
    wait_for_look(one, name)
    adapter(tmp_path / "a", b"weights")
    one.finish(name)
    one.settle()
    assert one.again([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [12]


def test_written_to_while_it_is_read(lora_engine, tmp_path, monkeypatch):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    monkeypatch.setattr(adapters.Contents, "reading", lambda folder: write(folder, b"others!"))
    one.run([IDS], lora_request=lora)
    for weights in (b"weights", b"weights", b"others!", b"others!"):
        write(tmp_path / "a", weights)
        assert one.again([IDS], lora_request=lora) == [300]


def test_workers_that_read_different_bytes_keep_nothing(lora_engine, tmp_path, monkeypatch):
    one, lora = lora_engine(tp=2), adapter(tmp_path / "a", b"weights")
    activate = adapters.Loras.set_active_adapters

    def then_write(self, *args):
        activate(self, *args)
        write(tmp_path / "a", b"others!")

    monkeypatch.setattr(adapters.Loras, "set_active_adapters", then_write)
    for weights in (b"weights", b"others!"):
        write(tmp_path / "a", weights)
        for _ in range(2):
            one.forget()
            name = one.ask(IDS, lora_request=lora)
            one.mixed.add(name)
            one.finish_somehow(name)
            one.settle()
            assert one.computed[name] == 300


@pytest.mark.parametrize("world", WORLDS)
def test_a_load_under_way_of_earlier_contents_brings_nothing(lora_engine, tmp_path, world):
    one = lora_engine(**WORLDS[world])
    lora, other = adapter(tmp_path / "a", b"weights"), adapter(tmp_path / "b", b"!", 2)
    one.run([IDS], lora_request=lora)
    one.run([prompt(2, 50)], lora_request=other)
    one.forget()
    for copies in one.copies:
        copies.may_load.clear()
    name = one.ask(IDS, lora_request=lora)
    one.until(lambda: one.status(name) == RequestStatus.WAITING_FOR_REMOTE_KVS)
    write(tmp_path / "a", b"others!")
    one.finish(one.ask(prompt(5, 50), lora_request=lora))  # reads it again
    for copies in one.copies:
        copies.may_load.set()
    one.finish(name)
    assert one.computed[name] == 300


def test_files_that_did_not_change_are_read_once(lora_engine, tmp_path, monkeypatch):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    read = []
    digest_of = lmc_vllm.adapters.digest_of
    monkeypatch.setattr(
        lmc_vllm.adapters, "digest_of", lambda *a, **k: (read.append(a), digest_of(*a, **k))[1]
    )
    looks = one.lmc._adapters
    for _ in range(2):  # written just now: what is there may change under the same time
        looks.look(lora).result(10)
    assert len(read) == 2
    monkeypatch.setattr(lmc_vllm.adapters, "SETTLED_S", -1.0)
    seen = {looks.look(lora).result(10) for _ in range(3)}
    assert (len(seen), len(read)) == (1, 3)
    write(tmp_path / "a", b"others!")
    assert looks.look(lora).result(10) not in seen


def test_a_load_that_nobody_told_of_keeps_nothing(lora_engine, tmp_path, monkeypatch):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    monkeypatch.setattr("lmc_vllm.worker.WorkerSide.take_adapters", lambda _: [])
    assert one.run([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [300]
    assert one.count("store.void") > 0


@pytest.mark.parametrize("wait_ms", ["0", "100"])
def test_a_look_that_takes_too_long_holds_up_nobody(lora_engine, tmp_path, monkeypatch, wait_ms):
    one, lora = lora_engine(LMC_STAGE_WAIT_MS=wait_ms), adapter(tmp_path / "a", b"weights")
    may_look = threading.Event()
    look = one.lmc._adapters._digest
    monkeypatch.setattr(one.lmc._adapters, "_digest", lambda f: (may_look.wait(20), look(f))[1])
    start = time.monotonic()
    assert one.run([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [300]
    assert time.monotonic() - start < 5
    assert one.count("adapter.late") == 2
    may_look.set()


def test_weights_that_change_leave_adapters_what_they_are(lora_engine, tmp_path):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    one.run([IDS], lora_request=lora)
    one.weights += 1
    one.core.collective_rpc("reload_weights")
    assert one.again([IDS], lora_request=lora) == [300]
    assert one.again([IDS], lora_request=lora) == [12]


def test_the_scheduler_reads_nothing_itself(lora_engine, tmp_path, monkeypatch):
    one, lora = lora_engine(), adapter(tmp_path / "a", b"weights")
    threads = set()
    look = one.lmc._adapters._digest

    def seen(files):
        threads.add(threading.current_thread().name)
        return look(files)

    monkeypatch.setattr(one.lmc._adapters, "_digest", seen)
    one.run([IDS], lora_request=lora)
    assert threads == {"lmc-adapters"}


def lora_in_place(lora: LoRARequest) -> LoRARequest:
    return LoRARequest(lora.lora_name, lora.lora_int_id, lora.lora_path, load_inplace=True)


def wait_for_look(one, name: str) -> None:
    one.lmc._requests[name].look.result(10)
