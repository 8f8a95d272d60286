"""Executors of the kernels, each made once."""

import functools
from collections.abc import Callable

import pytest

from .executors import Executor, make


@pytest.fixture(scope="session")
def executor_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Executor]:
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(lambda name: make(name, folder))
