"""Tenants beside each other: nobody gets, or notices, what another one left, in RAM or on disk.

A tenant is whoever sends another cache salt, another extra key or another LoRA adapter. Harnesses
on one folder are processes after or beside each other.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from lmc.tiers.disk import DiskTier
from lmc.tiers.ram import RamTier
from lmc_sglang import compat
from lmc_sglang.adapters import MARK, Adapters, Names, id_of, modules_of
from lmc_sglang.switch import LINKER, _adapter_names
from tests.integrations.auc import auc
from tests.integrations.harness import tokens

PROMPT = tokens(1, 600)
WHOLE = 576  # of the prompt's pages, all but the last token's

ODD = (
    *("a", "b", "ab", "ba", "A", " a", "a ", "a\0", "\0a", "a\0b", "a|b", "a/b", "../a", "a\nb"),
    *(
        "None",
        "0",
        "\u00e9",
        "e\u0301",
        "\u212b",
        "\u00c5",
        "\U0001f511",
        "\x01",
        "\x00",
        "a" * 5000,
    ),
)
TENANTS = [
    {},
    {"extra_key": ""},
    *({"cache_salt": odd} for odd in ODD),
    *({"extra_key": odd} for odd in ODD),
    {"extra_key": "a", "cache_salt": "b"},
    {"extra_key": "b", "cache_salt": "a"},
    {"extra_key": "", "cache_salt": "ab"},
    {"extra_key": "a\0", "cache_salt": "b"},
    {"extra_key": "a", "cache_salt": "\0b"},
]


@pytest.mark.parametrize("page", [1, 64])
def test_no_two_tenants_share_a_name(page):
    names = [get_storage_hash_str(RadixKey(PROMPT, **who), None, page_size=page) for who in TENANTS]
    assert len({name[-1] for name in names}) == len(TENANTS)


@pytest.mark.parametrize("disk", [False, True])
def test_no_tenant_finds_what_another_stored(harness, tmp_path, disk):
    """In RAM, and on disk from another process."""
    tiers = {"LMC_TIERS": f"file://{tmp_path}/tier"} if disk else {}
    first = harness(**tiers)
    second = harness(cold=True, **tiers) if disk else first
    for i, tenant in enumerate(TENANTS):
        first.flush()
        assert second.run(PROMPT, **tenant) == 0, (i, tenant)
        second.flush()
        first.run(PROMPT, **tenant)
        first.settle()
        first.store.drain(10)
    for tenant in TENANTS:
        second.flush()
        assert second.run(PROMPT, **tenant) == WHOLE, tenant


def test_an_empty_salt_is_none(harness):
    h = harness()
    h.run(PROMPT)
    h.settle()
    h.flush()
    assert h.run(PROMPT, cache_salt="") == WHOLE


# --- adapters


def make_adapter(folder, weights=b"weights", modules=("q_proj",), **more):
    folder.mkdir(exist_ok=True)
    config = {"r": 8, "lora_alpha": 8, "peft_type": "LORA", "target_modules": modules, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


class Settings(SimpleNamespace):
    """SGLang's LoRA settings, as a scheduler sees them."""

    def __init__(self, **settings):
        defaults = {"enable_lora": True, "lora_paths": [], "lora_target_modules": {"q_proj"}}
        super().__init__(**(defaults | settings))


@pytest.fixture
def settings(monkeypatch):
    """Sets what harnesses built from now on see: `settings(lora_paths=[...])`."""

    def put(**fields):
        made = Settings(**fields)
        monkeypatch.setattr(compat, "lora_settings", lambda: made)
        return made

    return put


def started(settings, *folders):
    """References to adapters, named as a launch names them."""
    names = Names(Settings())
    refs = [named(names, folder.name, folder) for folder in folders]
    settings(lora_paths=refs)
    return refs


def named(names, name, folder):
    lora_id = names.id_of(name, str(folder))
    given = {} if lora_id is None else {"lora_id": lora_id}
    return LoRARef(lora_name=name, lora_path=str(folder), **given)


def with_adapter(ref, extra_key="", **more):
    """What SGLang makes of a request with an adapter."""
    return {"lora_id": ref.lora_id, "extra_key": extra_key + ref.lora_id, **more}


def test_adapters_and_the_base_model_share_only_with_themselves(harness, tmp_path, settings):
    folders = [make_adapter(tmp_path / name, name.encode()) for name in "ab"]
    a, b = started(settings, *folders)
    tiers = {"LMC_TIERS": f"file://{tmp_path}/tier"}
    requests = [{}, with_adapter(a), with_adapter(a, "x"), with_adapter(a, cache_salt="x")]
    h = harness(**tiers)
    for request in requests:
        h.flush()
        assert h.run(PROMPT, **request) == 0
        h.settle()
    h.flush()
    assert h.run(PROMPT, **with_adapter(b)) == 0
    for request in requests:
        h.flush()
        assert h.run(PROMPT, **request) == WHOLE
    h.store.drain(10)

    settings(enable_lora=False)  # a server without adapters, beside it
    other = harness(cold=True, **tiers)
    assert other.run(PROMPT) == WHOLE

    a, b = started(settings, *folders)
    later = harness(cold=True, **tiers)
    for request in requests:
        later.flush()
        assert later.run(PROMPT, **request) == WHOLE
    later.flush()
    assert later.run(PROMPT, **with_adapter(b, "x")) == 0


@pytest.mark.parametrize(
    "change",
    [{"weights": b"Weights"}, {"lora_alpha": 16}, {"modules": ["k_proj"]}, {"use_rslora": True}],
    ids=str,
)
def test_what_an_adapter_holds_is_in_its_name(tmp_path, change):
    folder = make_adapter(tmp_path / "a")
    before = id_of("a", folder, ["q_proj"])
    assert id_of("a", make_adapter(tmp_path / "copy"), ["q_proj"]) == before
    assert id_of("b", folder, ["q_proj"]) != before  # a registry of SGLang's has an id once
    assert id_of("a", folder, ["q_proj", "o_proj"]) != before
    assert id_of("a", make_adapter(folder, **change), ["q_proj"]) != before
    assert len(before) == len(LoRARef().lora_id)


@pytest.mark.parametrize("kind", ["hub", "tensors", "unreadable", "touched"])
def test_chunks_of_an_adapter_that_cannot_be_told_stay_in_ram(harness, tmp_path, settings, kind):
    """The base model's beside it leave the process as ever."""
    folder = make_adapter(tmp_path / "a")
    names = Names(Settings())
    if kind == "touched":
        named(names, "a", folder)
        os.utime(folder / "adapter_model.safetensors", ns=(1, 1))  # SGLang's tree knows the id
    if kind == "unreadable":
        (folder / "adapter_model.safetensors").rename(folder / "notes.txt")
    path = {"hub": "team/adapter", "tensors": compat.TENSORS}.get(kind, folder)
    ref = named(names, "a", path)
    settings(lora_paths=[ref])
    tiers = {"LMC_TIERS": f"file://{tmp_path}/tier"}
    h = harness(**tiers)
    for request in ({}, with_adapter(ref), with_adapter(ref, "x")):
        h.run(PROMPT, **request)
        h.settle()
        h.flush()
        assert h.run(PROMPT, **request) == WHOLE
        h.flush()
    h.store.drain(10)
    assert sum(path.is_file() for path in (tmp_path / "tier" / "chunks").rglob("*")) == 3

    asked = Counter()
    later = harness(cold=True, **tiers)
    later.store.stage = lambda keys: asked.update(["stage"])
    assert later.run(PROMPT, **with_adapter(ref)) == 0
    assert not asked


def test_an_id_is_given_twice_only_while_its_files_are_the_same(tmp_path):
    names, folder = Names(Settings()), make_adapter(tmp_path / "a")
    given = names.id_of("a", str(folder))
    assert given is not None
    (folder / "notes.txt").write_text("no part of an adapter")
    assert names.id_of("a", str(folder)) == given
    trained = names.id_of("a", str(make_adapter(folder, b"trained")))
    assert trained not in (None, given)
    assert names.id_of("a", str(make_adapter(folder))) is None  # as it was, but written anew


def test_a_folder_called_as_sglang_calls_tensors_is_no_adapters(tmp_path, monkeypatch):
    make_adapter(tmp_path / compat.TENSORS)
    monkeypatch.chdir(tmp_path)
    assert Names(Settings()).id_of("a", compat.TENSORS) is None


@pytest.mark.parametrize(
    ("declared", "listed", "expected"),
    [
        ({"v_proj", "q_proj"}, [["o_proj"]], ["q_proj", "v_proj"]),
        (None, [["q_proj"], ["v_proj", "q_proj"]], ["q_proj", "v_proj"]),
        (None, ["all-linear"], ["all-linear"]),
        (None, [None], None),
    ],
)
def test_which_parts_adapters_change_is_the_users_word_or_the_first_adapters(
    tmp_path, declared, listed, expected
):
    folders = [make_adapter(tmp_path / str(n), modules=m) for n, m in enumerate(listed)]
    refs = [LoRARef(lora_name=folder.name, lora_path=str(folder)) for folder in folders]
    found = Settings(lora_paths=refs, lora_target_modules=declared)
    assert modules_of(found) == expected


def test_without_a_word_on_the_parts_no_adapter_has_a_name(tmp_path):
    away = LoRARef(lora_name="hub", lora_path="team/adapter")
    names = Names(Settings(lora_paths=[away], lora_target_modules=None))
    assert names.id_of("a", str(make_adapter(tmp_path / "a"))) is None


def test_an_adapter_that_changed_since_the_launch_is_refused(harness, tmp_path, settings):
    folder = make_adapter(tmp_path / "a")
    started(settings, folder)
    make_adapter(folder, b"trained")
    with pytest.raises(RuntimeError, match="adapter a changed on disk"):
        harness()


class Manager:
    """As much of SGLang's manager of adapters as the hooks look at."""

    def __init__(self):
        self.unloaded = []

    def unload_lora_adapter(self, ref):
        self.unloaded.append(ref)

    def create_lora_update_result(self, *, success, error_message):
        return SimpleNamespace(success=success, error_message=error_message)


@pytest.mark.parametrize("change", ["trained", "gone"])
def test_a_load_that_met_other_files_fails(harness, tmp_path, settings, change):
    settings()
    harness()
    manager, folder = Manager(), make_adapter(tmp_path / "a")
    ref = named(Names(Settings()), "a", folder)

    def load(manager, ref):
        if change == "trained":
            make_adapter(folder, b"trained")
        else:
            (folder / "adapter_model.safetensors").unlink()
        return SimpleNamespace(success=True)

    result = compat._on_adapter(load, manager, ref)
    assert not result.success
    assert "adapter a" in result.error_message
    assert manager.unloaded == [ref]


@pytest.mark.parametrize("path", ["folder", "hub"])
@pytest.mark.parametrize("success", [True, False])
def test_another_load_is_as_sglang_has_it(harness, tmp_path, settings, path, success):
    settings()
    harness()
    ref = named(Names(Settings()), "a", make_adapter(tmp_path / "a") if path == "folder" else path)
    loaded, manager = SimpleNamespace(success=success), Manager()
    assert compat._on_adapter(lambda *_: loaded, manager, ref) is loaded
    assert manager.unloaded == []


def test_an_adapter_loaded_later_comes_back_in_a_new_process(harness, tmp_path, settings):
    settings()
    tiers = {"LMC_TIERS": f"file://{tmp_path}/tier"}
    for expected in (0, WHOLE):
        ref = named(Names(Settings()), "a", make_adapter(tmp_path / "a"))
        h = harness(cold=True, **tiers)
        compat._on_adapter(lambda *_: SimpleNamespace(success=True), Manager(), ref)
        assert h.run(PROMPT, **with_adapter(ref)) == expected
        h.settle()
        h.store.drain(10)


@pytest.mark.parametrize("change", ["overwritten", "gone", "left alone"])
def test_files_that_changed_when_weights_are_taken_from_them(harness, tmp_path, settings, change):
    """SGLang maps them, and copies to the device whenever an adapter was pushed out there."""
    folder = make_adapter(tmp_path / "a")
    (ref,) = started(settings, folder)
    h = harness(LMC_TIERS=f"file://{tmp_path}/tier")
    weights = folder / "adapter_model.safetensors"
    if change == "overwritten":
        weights.write_bytes(b"trained")
    elif change == "gone":
        weights.unlink()
        folder.joinpath("adapter_config.json").unlink()
        folder.rmdir()
    for lora_id in (None, ref.lora_id):
        compat._on_adapter_copy(lambda *_: None, None, lora_id)
    h.run(PROMPT, **with_adapter(ref))
    h.settle()
    h.store.drain(10)
    assert h.store.stats.snapshot().get("disk.written", 0) == (3 if change == "left alone" else 0)
    h.flush()
    assert h.run(PROMPT, **with_adapter(ref)) == WHOLE
    assert h.linker.adapters.lasting(ref.lora_id) == (change == "left alone")


def test_a_reference_made_for_a_load_has_the_id_by_content(tmp_path, monkeypatch):
    folder, names = make_adapter(tmp_path / "a"), Names(Settings())
    fields = {"lora_name": "a", "lora_path": str(folder), "pinned": True}
    own = compat._new_adapter(**fields)
    assert not own.lora_id.startswith(MARK)
    monkeypatch.setattr(compat, "_names", names)
    ref = compat._new_adapter(**fields)
    assert ref == LoRARef(lora_id=id_of("a", folder, ["q_proj"]), **fields)
    tensors = compat._new_adapter(lora_name="a", lora_path=compat.TENSORS, pinned=False)
    assert not tensors.lora_id.startswith(MARK)


@pytest.mark.parametrize(
    ("linker", "nnodes", "named"),
    [(LINKER, 1, True), (LINKER, 2, False), ({**LINKER, "linker_module_path": "mine"}, 1, False)],
)
def test_adapters_are_named_where_lmc_is_the_linker_of_one_machine(linker, nnodes, named):
    args = Settings(unified_cache_external_linker_config=linker, nnodes=nnodes)
    assert (_adapter_names(args) is not None) == named


class FakeReq:
    def __init__(self, extra_key, lora_id):
        self.lora_id = lora_id
        self.extra_key = extra_key if lora_id is None else (extra_key or "") + lora_id


def made(extra_key, lora_id=None):
    """The extra key of a request, as SGLang makes it and lmc leaves it."""
    req = FakeReq.__new__(FakeReq)
    compat._on_request(FakeReq.__init__, req, extra_key, lora_id)
    return req.extra_key


def test_no_extra_key_passes_for_an_adapter(harness, tmp_path):
    """SGLang joins the two without a mark between them."""
    harness()
    lora_id = id_of("a", make_adapter(tmp_path / "a"), ["q_proj"])
    keys = [None, "", "x", lora_id, "x" + lora_id, lora_id + "x", lora_id + "\0", lora_id + "\0\0"]
    keys += [lora_id + lora_id, lora_id + "|elastic_ep_size=4"]
    alone = [made(key) for key in keys]
    joined = [made(key, lora_id) for key in ("", "x", lora_id, "\0")]
    assert len({*alone, *joined}) == len(alone) + len(joined)
    assert alone[:3] == [None, "", "x"]
    assert joined[1] == "x" + lora_id
    uuid = LoRARef().lora_id
    assert made(uuid) == uuid  # an extra key that many use


def test_adapters_of_a_server_without_are_none(settings):
    settings(enable_lora=False, lora_paths=["a=/somewhere"])
    assert Adapters().lasting(None)


# --- what an attacker can tell

VICTIM, ATTACKER = {"cache_salt": "victim"}, {"cache_salt": "attacker"}
NUM_PROBES = 1000


def prompts(num: int) -> list:
    return [tokens(seed, 129) for seed in range(num)]


def victims(harness, stored, *, disk=None):
    """A store that holds `stored` for the victim."""
    tiers = {"LMC_TIERS": f"file://{disk}"} if disk else {}
    h = harness(LMC_CHUNK_TOKENS="64", LMC_RAM_GB="0.2", **tiers)
    for i, prompt in enumerate(stored):
        h.run(prompt, **VICTIM)
        if i % 50 == 49:
            h.flush()
    h.flush()
    return h


@pytest.mark.parametrize("who", ["attacker", "victim"])
def test_the_length_of_a_hit_tells_an_attacker_nothing(harness, who):
    asked = prompts(NUM_PROBES)
    h = victims(harness, asked[::2])
    order = list(range(NUM_PROBES))
    random.Random(0).shuffle(order)
    lengths = {True: [], False: []}
    for i in order:
        req = h.arrive(asked[i], **(ATTACKER if who == "attacker" else VICTIM))
        match = h.match(req)
        lengths[i % 2 == 0].append(match.device_prefix_len + match.host_hit_length)
        h.step()
    told = auc(lengths[True], lengths[False])
    assert told == (0.5 if who == "attacker" else 1.0)


def test_a_probe_is_the_same_work_whether_the_victim_stored_its_prompt_or_not(
    harness, tmp_path, monkeypatch
):
    """What its time depends on: calls of RAM and disk, keys they are given, looks into indexes."""
    asked = prompts(40)
    h = victims(harness, asked[::2], disk=tmp_path / "tier")
    h.store.drain(10)
    work = Counter()

    class Index(dict):
        def get(self, key, default=None):
            work["looks into RAM"] += 1
            return super().get(key, default)

        def __contains__(self, key):
            work["looks into the disk's index"] += 1
            return super().__contains__(key)

    def count(kind, method):
        orig = getattr(kind, method)

        def call(self, keys, *args):
            work[method] += 1
            work[f"keys of {method}"] += len(keys)
            return orig(self, keys, *args)

        monkeypatch.setattr(kind, method, call)

    for kind, method in ((RamTier, "find"), (DiskTier, "probe"), (DiskTier, "read")):
        count(kind, method)
    h.store.ram._index = Index(h.store.ram._index)
    disk = h.store._guards[0]._tier
    disk._index = Index(disk._index)
    done = []
    for prompt in asked:
        work.clear()
        req = h.arrive(prompt, **ATTACKER)
        assert h.store.drain(10)  # what pool threads were asked is part of it
        h.match(req)
        h.step()
        done.append(dict(work))
    assert all(work == done[0] for work in done)
    assert done[0].keys() == {
        *("find", "keys of find", "looks into RAM"),
        *("probe", "keys of probe", "looks into the disk's index"),
    }
