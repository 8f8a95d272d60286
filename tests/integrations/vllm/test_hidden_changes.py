"""What changes KV without changing tokens or the model's name: each is told apart, or refused."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.config import MultiModalConfig
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs
from vllm.multimodal.registry import MultiModalRegistry
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import RequestStatus

import lmc_vllm.connector
from lmc_vllm import compat
from tests.integrations.vllm.fake import full, mamba, prompt, sliding
from tests.integrations.vllm.harness import Worker

STATES = {"specs": mamba(4, "align"), "block": 64, "mamba_mode": "align"}


def names(engine) -> list:
    return [lane.store.namespace for lane in engine.lmc.lanes]


def test_kv_that_hangs_on_later_tokens_is_refused(engine):
    specs = {name: replace(spec, non_causal=True) for name, spec in full(2).items()}
    with pytest.raises(ValueError, match="lmc"):
        engine(specs)


def train(worker, *_: object, **__: object) -> None:
    """Stands for what changes weights in place, whatever it is called."""
    worker.engine.weights += 1


def look(worker) -> None:
    """What its user knows to be harmless."""


look.lmc_leaves_weights = True


def fail(worker) -> None:
    train(worker)
    raise OSError("after half of the weights")


CALLS = {
    "reload_weights": lambda core: core.collective_rpc("reload_weights"),
    "weight transfer": lambda core: core.collective_rpc("update_weights", kwargs={"info": {}}),
    "apply_model": lambda core: core.collective_rpc("apply_model", args=(len,)),
    "an extension of workers": lambda core: core.collective_rpc("get_better"),
    "a function": lambda core: core.collective_rpc(train),
    "the executor itself": lambda core: core.model_executor.collective_rpc("set_layer", args=(1,)),
    "experts that move": lambda core: core.model_executor.collective_rpc(
        "elastic_ep_execute", args=("prepare_new_worker",)
    ),
    "sleep": lambda core: (core.sleep(2), core.wake_up()),
    "sleep past vLLM's caches": lambda core: core.collective_rpc("sleep", kwargs={"level": 2}),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_may_change_weights_begins_a_generation(engine, call, monkeypatch):
    one = engine()
    for name in ("reload_weights", "update_weights", "apply_model", "get_better", "set_layer"):
        monkeypatch.setattr(Worker, name, train, raising=False)
    for name in ("sleep", "elastic_ep_execute"):
        monkeypatch.setattr(Worker, name, train, raising=False)
    one.run([prompt(1, 300)])
    CALLS[call](one.core)
    assert one.weights
    assert one.again([prompt(1, 300)]) == [300]
    assert one.again([prompt(1, 300)]) == [12]


def test_a_call_that_failed_may_have_changed_weights(engine):
    one = engine()
    one.run([prompt(1, 300)])
    with pytest.raises(OSError, match="half of the weights"):
        one.core.collective_rpc(fail)
    assert one.again([prompt(1, 300)]) == [300]


@pytest.mark.parametrize(
    "call",
    [
        lambda core: core.compute_weight_checksums(),
        lambda core: core.collective_rpc("get_model_inspection"),
        lambda core: core.collective_rpc("check_health", timeout=10),
        lambda core: core.profile(is_start=True),
        lambda core: core.collective_rpc(look),
        lambda core: core.save_sharded_state("somewhere"),
        lambda core: core.execute_dummy_batch(),
        lambda core: core.reset_mm_cache(),
        lambda core: core.sleep(0),
    ],
)
def test_what_only_looks_leaves_what_is_kept(engine, call):
    one = engine()
    one.run([prompt(1, 300)])
    call(one.core)
    one.core.resume_scheduler()
    assert one.again([prompt(1, 300)]) == [12]


def test_one_engines_weights_are_not_anothers(engine):
    one, other = engine(), engine()
    for either in (one, other):
        either.run([prompt(1, 300)])
    one.core.collective_rpc(train)
    assert other.again([prompt(1, 300)]) == [12]
    assert one.again([prompt(1, 300)]) == [300]


@pytest.mark.parametrize(
    "world",
    [
        {},
        {"specs": sliding(4, 100), "blocks": 300},
        STATES,
        {"pp": 2, "overlap": False},
        {"caching": False},
    ],
    ids=["full", "windows", "states", "stages", "no cache"],
)
def test_a_load_reported_before_weights_changed_is_computed_again(engine, world):
    one = engine(**({"overlap": True, "late": "all"} | world))
    one.run([prompt(1, 300)])
    if world.get("caching", True):
        one.forget()
    for copies in one.copies:
        copies.may_load.clear()
    busy = one.ask(prompt(2, 40), 200)
    one.until(lambda: len(one.said[busy]) > 3)
    name = one.ask(prompt(1, 300))
    one.until(lambda: one.status(name) == RequestStatus.WAITING_FOR_REMOTE_KVS)
    one.step()
    one.step()
    for copies in one.copies:
        copies.may_load.set()
    sides = [worker.connector.worker for worker in one.workers]
    deadline = time.monotonic() + 20
    while not all(job.done() for side in sides for job in side._loads.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    executor = one.core.model_executor
    for worker in one.workers:  # they report it; the scheduler has not seen that step's result
        executor._drain(worker, executor.steps)
    one.weights += 1
    one.scheduler.reset_prefix_cache(reset_connector=True)
    one.abort(busy)
    one.finish(name)
    assert one.computed[name] == 300


def test_the_length_longrope_goes_by_is_in_the_name(engine):
    def longrope(config) -> None:
        config.model_config.hf_text_config.rope_parameters = {
            "rope_type": "longrope",
            "original_max_position_embeddings": 1024,
        }

    short, long = (engine(configure=longrope, max_len=length) for length in (1000, 2000))
    assert names(short) != names(long)
    assert names(engine(max_len=1000)) == names(engine(max_len=2000))


def test_the_configuration_in_force_is_in_the_name(engine):
    def other_rope(config) -> None:
        config.model_config.hf_config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}

    assert names(engine(configure=other_rope)) != names(engine())


def test_how_media_are_prepared_is_in_the_name(engine):
    def media(cache_gb: float, **options):
        def configure(config) -> None:
            made = MultiModalConfig(mm_processor_cache_gb=cache_gb, mm_processor_kwargs=options)
            config.model_config.multimodal_config = made

        return configure

    small, large = (names(engine(configure=media(4, max_pixels=n))) for n in (1, 2))
    assert small != large
    assert not small[0].private
    assert names(engine(configure=media(0), caching=False))[0].private, "media are only numbered"
    assert not names(engine(configure=media(0), caching=True))[0].private


CAT, DOG = "00c4" * 16, "0d06" * 16


def picture(name: str) -> list[MultiModalFeatureSpec]:
    """A feature as vLLM makes it: the id of its embeddings, and the hash it was made of."""
    place = PlaceholderRange(offset=100, length=90)
    made_of = name.removeprefix("an adapter:")
    return [MultiModalFeatureSpec(None, "image", name, place, made_of)]


@pytest.fixture
def seeing(engine, tmp_path):
    """Builds engines that take pictures, over one folder."""

    def build():
        one = engine(LMC_TIERS=f"file://{tmp_path}?gb=1")
        one.scheduler.max_num_encoder_input_tokens = 1000
        one.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)
        return one

    return build


@pytest.mark.parametrize("name", [CAT, CAT * 2, f"an adapter:{CAT}"])
def test_media_called_by_their_content_are_shared(seeing, name):
    seeing().run([prompt(1, 300)], mm_features=picture(name))
    assert seeing().run([prompt(1, 300)], mm_features=picture(name)) == [12]


@pytest.mark.parametrize("name", ["image-1", CAT[:-1], CAT.upper(), f"given:{CAT}", ""])
def test_media_called_by_their_user_stay_in_the_process(seeing, name):
    """The same id in another process is another picture."""
    one = seeing()
    one.run([prompt(1, 300)], mm_features=picture(name))
    assert one.again([prompt(1, 300)], mm_features=picture(name)) == [12]
    assert one.count("disk.written") == 0
    one.run([prompt(2, 300)], mm_features=picture(DOG))
    assert one.count("disk.written") > 0


@pytest.fixture
def hashes_of(monkeypatch):
    """vLLM's hashes of one image, as a process with lmc makes them."""
    made = SimpleNamespace(
        _get_mm_hashes=lambda inputs: inputs.get_mm_hashes("a model", "blake3"),
    )
    monkeypatch.setattr(MultiModalRegistry, "create_processor", lambda self: made)
    compat.mark_given_ids()
    processor = MultiModalRegistry().create_processor()

    def hashes(image: bytes | None, uuid: str | None, **kwargs: object) -> str:
        items = {"image": SimpleNamespace(get_all_items_for_hash=lambda: [image])}
        inputs = ProcessorInputs([], items, {"image": [uuid]}, hf_processor_mm_kwargs=kwargs)
        return processor._get_mm_hashes(inputs)["image"][0]

    return hashes


def test_an_id_that_vllm_hashes_is_still_known_as_given(hashes_of):
    assert hashes_of(None, "image-1") == "image-1"
    for given in (hashes_of(None, "image-1", crop=True), hashes_of(None, CAT)):
        assert not media_are_hashed(picture(given))
    assert hashes_of(None, "image-1", crop=True) != hashes_of(None, "image-1", crop=False)


def test_hashes_of_content_are_vllms_own(hashes_of):
    for kwargs in ({}, {"crop": True}):
        name = hashes_of(b"pixels", None, **kwargs)
        assert media_are_hashed(picture(name))
        factors = {"mm_processor_kwargs": kwargs} if kwargs else {}
        own = MultiModalHasher.hash_kwargs("blake3", model_id="a model", image=b"pixels", **factors)
        assert name == own


def media_are_hashed(features: list[MultiModalFeatureSpec]) -> bool:
    return compat.media_are_hashed(SimpleNamespace(mm_features=features))


def test_the_harness_really_plans_a_step_before_the_last_one_is_over(engine):
    assert engine(overlap=True).core.batch_queue is not None
    assert engine().core.batch_queue is None


@pytest.mark.parametrize("ram_bytes", [100_000_000, 1000])
@pytest.mark.parametrize("world", [{}, STATES], ids=["full", "states"])
def test_a_start_with_the_first_step_ends_no_request(engine, world, ram_bytes, monkeypatch):
    """As beside another connector, whose handshake vLLM hands on instead of ours."""
    hook = "set_xfer_handshake_metadata_pp_aware"
    monkeypatch.setattr(lmc_vllm.connector.LMCConnector, hook, lambda *_: None)
    one = engine(extra={"ram_bytes": ram_bytes}, **world)
    one.run([prompt(1, 300)], 3)
    one.run([prompt(2, 300)], 3)
    one.again([prompt(2, 300)])
