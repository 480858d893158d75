"""Prepared data, once for all tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.tiny_run import prepare_tiny_data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of shards."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Fix the number of threads: bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
