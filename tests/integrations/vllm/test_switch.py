"""Switching lmc on in vLLM: what turns into a connector, and what is left alone."""

from __future__ import annotations

import argparse
import logging

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from lmc_vllm import switch
from tests.integrations.vllm.fake import full, prompt


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("LMC_ENABLE", "LMC_RAM_GB"):
        monkeypatch.delenv(name, raising=False)


class DecoderOnly:
    is_encoder_decoder = False


class EncoderDecoder:
    is_encoder_decoder = True


@pytest.fixture
def bare(monkeypatch):
    """`EngineArgs` as nobody has wrapped it; its engine's configuration is itself, of a model that
    is no encoder-decoder.
    """
    config = EngineArgs.create_engine_config
    parser = EngineArgs.__dict__["add_cli_args"].__func__
    while hasattr(config, "__wrapped__"):
        config = config.__wrapped__
    while hasattr(parser, "__wrapped__"):
        parser = parser.__wrapped__
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: self)
    monkeypatch.setattr(EngineArgs, "model_config", DecoderOnly, raising=False)
    monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(parser))
    monkeypatch.setattr(EngineArgs, "_lmc_registered", False, raising=False)


def resolve(model_folder, **arguments) -> EngineArgs:
    return EngineArgs(model=str(model_folder), **arguments).create_engine_config()


@pytest.mark.usefixtures("bare")
class TestApply:
    @pytest.fixture(autouse=True)
    def register(self, bare):
        switch.register()

    def test_the_name_becomes_a_connector(self, model_folder):
        args = resolve(model_folder, kv_offloading_backend="lmc", kv_offloading_size=2)
        config = args.kv_transfer_config
        assert (config.kv_connector, config.kv_role) == ("LMCConnector", "kv_both")
        assert config.kv_connector_module_path == "lmc_vllm.connector"
        assert config.kv_connector_extra_config == {"ram_bytes": 2 << 30}
        assert (args.kv_offloading_backend, args.kv_offloading_size) == ("native", None)

    def test_without_a_size_the_setting_decides(self, model_folder):
        args = resolve(model_folder, kv_offloading_backend="lmc")
        assert args.kv_transfer_config.kv_connector_extra_config == {}

    def test_installed_and_not_enabled_nothing_changes(self, model_folder):
        args = resolve(model_folder)
        assert args.kv_transfer_config is None

    def test_installed_and_not_enabled_a_bad_setting_is_nobodys_business(
        self, model_folder, monkeypatch
    ):
        monkeypatch.setenv("LMC_RAM_GB", "plenty")
        assert resolve(model_folder).kv_transfer_config is None
        monkeypatch.setenv("LMC_ENABLE", "0")
        assert resolve(model_folder, kv_offloading_backend="lmc").kv_transfer_config is None

    def test_one_in_the_environment_is_enough(self, model_folder, monkeypatch):
        monkeypatch.setenv("LMC_ENABLE", "1")
        assert resolve(model_folder).kv_transfer_config.kv_connector == "LMCConnector"

    @pytest.mark.parametrize(
        "other",
        [
            {"kv_transfer_config": KVTransferConfig(kv_connector="Other", kv_role="kv_both")},
            {"kv_offloading_size": 1.0},
            {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        ],
        ids=["connector", "native", "lmcache"],
    )
    def test_one_in_the_environment_leaves_others_alone(self, model_folder, monkeypatch, other):
        monkeypatch.setenv("LMC_ENABLE", "1")
        args = resolve(model_folder, **other)
        for name, value in other.items():
            assert getattr(args, name) is value

    def test_one_in_the_environment_leaves_encoder_decoders_alone(
        self, model_folder, monkeypatch, caplog
    ):
        monkeypatch.setattr(EngineArgs, "model_config", EncoderDecoder)
        monkeypatch.setenv("LMC_ENABLE", "1")
        with caplog.at_level(logging.INFO, logger="lmc"):
            assert resolve(model_folder).kv_transfer_config is None
        assert "lmc stays off: vLLM gives encoder-decoder models no KV connector" in caplog.text
        named = resolve(model_folder, kv_offloading_backend="lmc")
        assert named.kv_transfer_config is not None  # vLLM says why it does not go

    def test_zero_in_the_environment_wins(self, model_folder, monkeypatch):
        monkeypatch.setenv("LMC_ENABLE", "0")
        args = resolve(model_folder, kv_offloading_backend="lmc", kv_offloading_size=2)
        assert args.kv_transfer_config is None
        assert (args.kv_offloading_backend, args.kv_offloading_size) == ("native", None)

    def test_the_users_policy_is_kept(self, model_folder):
        args = resolve(
            model_folder,
            kv_offloading_backend="lmc",
            kv_transfer_config={"kv_load_failure_policy": "fail"},
        )
        extra = args.kv_transfer_config.kv_connector_extra_config
        assert extra == {"kv_load_failure_policy": "fail"}
        assert args.kv_transfer_config.kv_connector == "LMCConnector"

    @pytest.mark.parametrize("kind", [dict, lambda **fields: KVTransferConfig(**fields)])
    def test_a_process_that_prepares_media_knows_which_engine_has_lmc(
        self, model_folder, monkeypatch, kind
    ):
        marked = []
        monkeypatch.setattr(switch.compat, "mark_given_ids", lambda: marked.append(True))
        lmc = {"kv_connector": "LMCConnector", "kv_role": "kv_both"}
        other = {"kv_connector": "Other", "kv_role": "kv_both"}
        both = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [other, lmc]},
        }
        for config, count in ((None, 0), (kind(**other), 0), (kind(**lmc), 1), (kind(**both), 2)):
            resolve(model_folder, kv_transfer_config=config)
            assert len(marked) == count
        resolve(model_folder, kv_offloading_backend="lmc")
        assert len(marked) == 3

    @pytest.mark.parametrize("kind", [dict, lambda **fields: KVTransferConfig(**fields)])
    def test_two_connectors_are_refused(self, model_folder, kind):
        other = kind(kv_connector="Other", kv_role="kv_both")
        with pytest.raises(ValueError, match="Other ask for two connectors; MultiConnector takes"):
            resolve(model_folder, kv_offloading_backend="lmc", kv_transfer_config=other)

    def test_resolving_twice_changes_nothing(self, model_folder):
        args = EngineArgs(
            model=str(model_folder), kv_offloading_backend="lmc", kv_offloading_size=1
        )
        first = args.create_engine_config().kv_transfer_config
        assert args.create_engine_config().kv_transfer_config is first

    def test_the_command_line_knows_the_name(self):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        words = ["--kv-offloading-backend", "lmc", "--kv-offloading-size", "3"]
        assert parser.parse_args(words).kv_offloading_backend == "lmc"
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            parser.parse_args(["--kv-offloading-backend", "other"])

    def test_registering_again_wraps_nothing_twice(self):
        before = EngineArgs.create_engine_config
        switch.register()
        assert EngineArgs.create_engine_config is before


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_plugins_may_wrap_too(bare, model_folder, monkeypatch, order):
    seen = []

    def wrap() -> None:
        inner, inner_cli = EngineArgs.create_engine_config, EngineArgs.add_cli_args

        def create_engine_config(self):
            seen.append("config")
            return inner(self)

        def add_cli_args(parser):
            seen.append("parser")
            return inner_cli(parser)

        monkeypatch.setattr(EngineArgs, "create_engine_config", create_engine_config)
        monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(add_cli_args))

    steps = [wrap, switch.register] if order == "before" else [switch.register, wrap]
    for step in steps:
        step()
    args = resolve(model_folder, kv_offloading_backend="lmc")
    assert args.kv_transfer_config.kv_connector == "LMCConnector"
    EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert seen == ["config", "parser"]


@pytest.mark.parametrize("gone", ["create_engine_config", "add_cli_args"])
def test_a_vllm_without_these_functions_is_left_alone_with_one_line(
    bare, monkeypatch, caplog, gone
):
    other = "add_cli_args" if gone == "create_engine_config" else "create_engine_config"
    kept = EngineArgs.__dict__[other]
    monkeypatch.delattr(EngineArgs, gone)
    with caplog.at_level(logging.WARNING, logger="lmc"):
        switch.register()
    [line] = [record for record in caplog.records if record.name == "lmc"]
    assert "kv_transfer_config with kv_connector_module_path='lmc_vllm.connector'" in line.message
    assert EngineArgs.__dict__[other] is kept


def test_the_name_alone_makes_an_engine_with_lmc(engine):
    """From the option to the bytes, with vLLM's own resolution in between."""
    one = engine(
        full(4),
        arguments={
            "kv_transfer_config": None,
            "kv_offloading_backend": "lmc",
            "kv_offloading_size": 0.05,
        },
    )
    store = one.lmc.lanes[0].store
    assert store.arena.num_slots * store.arena.slot_bytes <= 0.05 * 2**30
    one.run([prompt(1, 300)])
    assert one.again([prompt(1, 300)]) == [12]


@pytest.mark.parametrize(
    ("extra", "recomputes"),
    [
        ({}, True),
        ({"kv_load_failure_policy": "recompute"}, True),
        ({"kv_load_failure_policy": "fail"}, False),
    ],
    ids=str,
)
def test_what_a_failed_load_does_to_its_request(engine, extra, recomputes):
    """vLLM's own default is to end it."""
    assert engine(full(2), extra=extra).scheduler.recompute_kv_load_failures is recomputes


def test_an_unknown_policy_is_refused(engine):
    with pytest.raises(ValueError, match="policy='retry'; choices: recompute, fail"):
        engine(full(2), extra={"kv_load_failure_policy": "retry"})
