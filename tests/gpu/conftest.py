"""Tests of what only a CUDA GPU can show: all of them are skipped where there is none.

make test-gpu                          # or: pytest tests/gpu
pytest tests/gpu --device cpu          # tries the tests' logic without a GPU; it says nothing about one
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import TrainingConfig
from switchmamba.training.step_graph import StepGraph
from tests.gpu.training_steps import skip_if_not_captured_here
from tests.training.tiny_run import prepare_tiny_data

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="of tests/gpu; cpu tries the tests' logic without a GPU",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Show warnings here instead of failing by them: other libraries have some about GPUs that are not ours to mend."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU; without one every test of this folder is skipped. Matrix products in fp32 are in fp32."""
    # The option is unknown where pytest was started on more than this folder.
    name = request.config.getoption("--device", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch finds none; pytest tests/gpu --device cpu tries the logic")
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield torch.device(name)
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture
def two_gpus(device: torch.device) -> None:
    """Skip a test where there is one GPU only; with ``--device cpu`` it runs, on what it takes in their place."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.fixture
def assert_captured(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[int], None]:
    """Return what asserts that so many runs were trained, all with a captured step; on a CPU there is no capture."""
    made: list[StepGraph] = []

    class Remembered(StepGraph):
        def __init__(self, model: LanguageModel, optimizer: AdamW, config: TrainingConfig) -> None:
            skip_if_not_captured_here(model, config)
            super().__init__(model, optimizer, config)
            made.append(self)

    def check(runs: int) -> None:
        assert len(made) == (runs if device.type == "cuda" else 0)
        assert all(graph.captured for graph in made)

    monkeypatch.setattr("switchmamba.training.trainer.StepGraph", Remembered)
    return check


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, as shards."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))
