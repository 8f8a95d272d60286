"""A repeated prompt recomputes no more than a page, or sixteen tokens, whatever the page size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engines.test_sglang import repeat, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engines.sglang_server import SglangServer

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("page", [1, 16, 64, 256])
def test_a_repeated_prompt_recomputes_at_most_a_step(
    launch: Callable[..., SglangServer], page: int
) -> None:
    with launch("--page-size", str(page), LMC_ENABLE="1", LMC_RAM_GB="0.1") as server:
        for length in (2048, 2050, 4091):
            asked = repeat(server, tokens(length, seed=length))
            assert asked.cold.cached_tokens == 0
            assert length - asked.after_flush.cached_tokens <= max(page, 16), length
            assert asked.after_flush.output_ids == asked.engine_hit.output_ids
