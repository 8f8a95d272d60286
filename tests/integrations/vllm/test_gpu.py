"""vLLM's scheduler over a worker that copies by a GPU's driver: the fake one, whose streams do
nothing before they are waited for (tests/kernels/fake_driver.cpp). The model runs in a stream as
well, so what lmc forgets to wait for, or to have the model wait for, are wrong bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.integrations.vllm.fake import full, mamba, prompt, sliding
from tests.kernels.fake import VENDORS, Fake, build_all

if TYPE_CHECKING:
    from pathlib import Path

    from lmc.kernels import Vendor


class Gpu:
    """One of the vendor's, with the stream that the model runs in."""

    def __init__(self, fake: Fake, **policy: Any) -> None:
        self.fake, self.policy = fake, policy
        fake.driver.use(0)
        self.stream = fake.driver.stream()

    def backend(self) -> Any:
        return self.fake.backend(**self.policy)

    def finish(self) -> None:
        event = self.fake.driver.event()
        self.fake.driver.event_record(event, self.stream)
        self.fake.driver.event_wait(event)
        self.fake.driver.event_end(event)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Vendor, Path]:
    return build_all(tmp_path_factory.mktemp("drivers"))


@pytest.fixture(params=VENDORS, ids=str)
def fake(request: pytest.FixtureRequest, libraries: dict[Vendor, Path]) -> Fake:
    return Fake(request.param, libraries[request.param])


@pytest.fixture(params=[None, 0], ids=["reaching", "staged"])
def gpu(request: pytest.FixtureRequest, fake: Fake) -> Gpu:
    return Gpu(fake, staged_from=request.param)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (full(4), {}),
    "windows": (sliding(4, 100), {"blocks": 300}),
    "states": (mamba(4, "align"), {"block": 64, "mamba_mode": "align"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
def test_every_kind_of_layer_comes_back(engine, gpu, kind, overlap):
    specs, options = KINDS[kind]
    late = {"overlap": True, "late": "all"} if overlap else {}
    one = engine(specs, gpu=gpu, **options, **late)
    prompts = [prompt(seed, 330) for seed in range(3)]
    one.run(prompts)
    assert max(one.again(prompts)) <= 330 % options.get("block", 16)
    one.close()
    gpu.fake.driver.stream_end(gpu.stream)
    assert gpu.fake.left == 0


def test_pages_that_others_get_are_stored_before(engine, gpu):
    """Three requests that do not fit: blocks are given away while they are stored."""
    gpu.fake.set("patience", 100)  # a store is not over for having been looked at
    one = engine(blocks=40, max_len=400, gpu=gpu)
    names = [one.ask(prompt(seed, 150), 150) for seed in range(3)]
    one.until(lambda: any(one.asked[name][0].num_preemptions for name in names))
    one.finish(*names)
    one.settle()
    assert one.again([prompt(seed, 150) for seed in range(3)]) == [6, 6, 6]


def test_a_launch_that_fails_is_a_miss(engine, gpu):
    one = engine(gpu=gpu)
    one.run([prompt(1, 300)])
    one.forget()
    gpu.fake.set("fail_launch", gpu.fake.count("launches") + 1)
    assert one.run([prompt(1, 300)]) == [300]
    assert one.count("load.failed") == 1
    assert one.again([prompt(1, 300)]) == [300 % 16]
