"""LoRA adapters in a real SGLang with lmc: each finds what its own weights left, also after a
restart, and nothing of another's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.models import make_adapter
from tests.engines.test_sglang import LINKER, Repeated, check, same, tokens, whole_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.engines.server import Answer
    from tests.engines.sglang_server import SglangServer

pytestmark = pytest.mark.engine

PROMPT = tokens(1000, seed=1)
WHOLE = whole_pages(PROMPT)
MODULES = ("k_proj", "o_proj", "q_proj", "v_proj")


def ask(server: SglangServer, adapter: str | None, **options: Any) -> Answer:
    named = {"lora_path": adapter} if adapter else {}
    return server.generate(PROMPT, 8, logprobs=True, **named, **options)


def repeat(server: SglangServer, adapter: str | None) -> Repeated:
    """Beside what other adapters left on the device and in lmc."""
    cold, engine_hit = ask(server, adapter), ask(server, adapter)
    server.flush()
    return Repeated(cold, engine_hit, ask(server, adapter))


def load(server: SglangServer, name: str, folder: Path) -> None:
    server.call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


def unload(server: SglangServer, name: str) -> None:
    server.call("POST", "/unload_lora_adapter", {"lora_name": name})


def check_strangers(answers: Sequence[Answer]) -> None:
    """None found anything of another's, and no answer is another's."""
    assert [answer.cached_tokens for answer in answers] == [0] * len(answers)
    assert len({answer.output_ids for answer in answers}) == len(answers)


def test_an_adapter_hits_what_its_own_weights_left(
    launch: Callable[..., SglangServer], tmp_path: Path
) -> None:
    """Two are there from the start, one is loaded later, twice with other weights; between the
    processes one more is trained again.
    """
    from lmc_sglang.adapters import id_of

    places = {name: tmp_path / name for name in ("a", "b", "c")}
    for seed, place in enumerate(places.values()):
        make_adapter(place, seed)
    flags = ("--lora-backend", "torch_native", "--max-loras-per-batch", "4")
    flags += ("--lora-paths", *(f"{name}={places[name]}" for name in "ab"))
    settings = {"LMC_RAM_GB": "0.1", "LMC_TIERS": f"file://{tmp_path / 'chunks'}?gb=1"}

    with launch(*flags, LMC_ENABLE="1", **settings) as server:
        load(server, "c", places["c"])
        asked = {name: repeat(server, name) for name in (None, *places)}
        for repeated in asked.values():
            check(repeated, WHOLE)

        unload(server, "c")
        load(server, "c", places["c"])
        assert same(ask(server, "c"), asked["c"].engine_hit)
        unload(server, "c")
        make_adapter(places["c"], seed=3)
        load(server, "c", places["c"])
        trained = repeat(server, "c")
        check(trained, WHOLE)
        check_strangers([one.cold for one in (*asked.values(), trained)])

        posing = ask(server, None, extra_key=id_of("a", places["a"], MODULES))
        assert same(posing, asked[None].cold)
        server.drain()

    make_adapter(places["b"], seed=4)
    with launch(*flags, LMC_ENABLE="1", **settings) as server:
        load(server, "c", places["c"])
        for name, before in ((None, asked[None]), ("a", asked["a"]), ("c", trained)):
            assert same(ask(server, name), before.engine_hit)
        check_strangers([one.cold for one in (*asked.values(), trained)] + [ask(server, "b")])


def test_adapters_of_a_linker_by_flags_keep_to_ram(
    launch: Callable[..., SglangServer], tmp_path: Path
) -> None:
    """Nobody named them in the launching process."""
    make_adapter(tmp_path / "a", seed=1)
    flags = ("--lora-backend", "torch_native", "--lora-paths", f"a={tmp_path / 'a'}")
    flags += ("--page-size", "64", "--enable-unified-cache-external-linker")
    flags += ("--unified-cache-external-linker-backend", "dynamic")
    flags += ("--unified-cache-external-linker-config", json.dumps(LINKER))
    settings = {"LMC_RAM_GB": "0.1", "LMC_TIERS": f"file://{tmp_path / 'chunks'}?gb=1"}
    with launch(*flags, **settings) as server:
        check(repeat(server, "a"), WHOLE)
        server.drain()
        assert not server.lmc().get("disk.written")
        check(repeat(server, None), WHOLE)
        server.drain()
        assert server.lmc()["disk.written"] == 4
