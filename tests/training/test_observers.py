"""Who watches a run: the terminal, TensorBoard."""

import io
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from switchmamba.errors import ConfigError
from switchmamba.training.progress import TerminalProgress
from switchmamba.training.tensorboard import TensorBoard

LINE = {
    "step": 3,
    "tokens": 3000,
    "loss": 2.5,
    "loss_ema": 2.75,
    "learning_rate": 0.1,
    "tokens_per_second": 1234.0,
    "load_balance_loss": 1.5,
    "routers": [{"fraction": [0.5, 0.5], "entropy": 0.69, "dropped": 0.0, "dead": 0, "largest_load": 1.0}],
}


class Writer:
    """Stands in for the package's SummaryWriter."""

    def __init__(self, directory: str, purge_step: int) -> None:
        self.directory, self.purge_step, self.closed = directory, purge_step, False
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = (value, step)

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number_of_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writers: list[Writer] = []

    def open_writer(directory: str, purge_step: int) -> Writer:
        writers.append(Writer(directory, purge_step))
        return writers[-1]

    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = open_writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    board = TensorBoard(tmp_path)
    assert not writers, "nothing is written before the run begins"
    board.start(2, 10)
    board.show(LINE)
    board.close()
    (writer,) = writers
    assert (writer.directory, writer.purge_step, writer.closed) == (str(tmp_path), 3, True)
    assert writer.scalars["loss"] == (2.5, 3)
    assert writer.scalars["load_balance_loss"] == (1.5, 3)
    assert writer.scalars["router_0/entropy"] == (0.69, 3)
    assert "validation_loss" not in writer.scalars


def test_tensorboard_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'switchmamba\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_the_bar_shows_step_loss_speed_and_load() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with TerminalProgress(console, "mine") as progress:
        progress.start(2, 10)
        progress.show(LINE)
    shown = screen.getvalue()
    for text in ("mine", "3/10", "loss 2.500", "1,234 tok/s", "1.0×", "ETA"):
        assert text in shown
