"""What was computed once comes back byte for byte, in every layout and world."""

from __future__ import annotations

import pytest

from tests.integrations.vllm.fake import full, prompt
from tests.integrations.vllm.harness import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_comes_back(engine, layout):
    one = engine(full(4), layout=layout)
    ids = prompt(1, 300)
    assert one.run([ids]) == [300]
    assert one.again([ids]) == [12]
