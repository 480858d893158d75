"""Whole commands on a GPU: train, upcycle, evaluate in pieces, and an experiment with a run on each of two GPUs."""

import json

import pytest

from switchmamba.cli import main
from switchmamba.experiments.processes import default_slots
from switchmamba.experiments.results import read_results
from switchmamba.models.loading import save_model
from tests.experiments.test_command import TINY, write
from tests.generation.tiny_models import tiny_model, tiny_tokenizer
from tests.training.tiny_run import read_lines

MLP = ("--model.layers.mlp.kind", "mlp", "--model.layers.mlp.d_ff", "96")
GROWN = {
    "new experts": (("--model.num_blocks", "2"), ()),
    "feed-forwards become experts": (
        ("--model.num_blocks", "2", "--model.pattern", '["mamba", "mlp"]', *MLP),
        ("--model.layers.moe.router.top_k", "2"),  # one expert's weight is not 1, two experts' sum is
    ),
}


@pytest.mark.parametrize("name", GROWN)
def test_an_upcycled_model_starts_at_the_loss_of_its_source_and_trains_captured(
    name, data_dir, tmp_path, device, assert_captured
):
    source, further, grown, onward = (tmp_path / part for part in ("source", "further", "grown", "onward"))
    dense, sparse = GROWN[name]

    def train(preset, out, *more):
        settings = ["--training.device", device.type, "--training.batch_size", "4", "--steps", "6"]
        settings += ["--data.context_length", "64", "--training.validate_every", "0"]
        assert main(["train", preset, "--data", str(data_dir), "--out", str(out), *settings, *more]) == 0
        return [line["loss"] for line in read_lines(out)]

    learnt = train("mamba-tiny", source, *dense)
    assert main(["upcycle", str(source), "--to", "moe-mamba-tiny", *sparse, "--out", str(grown)]) == 0
    begin = ("--training.seed", "1", "--from")
    as_before = train("mamba-tiny", further, *dense, *begin, str(source))
    losses = train("moe-mamba-tiny", onward, *sparse, *begin, str(grown))
    assert_captured(3)
    assert losses[0] == pytest.approx(as_before[0], rel=2e-3)
    assert losses[0] < learnt[0] - 0.02  # not that of a fresh model
    assert losses[-1] < losses[0]


def test_evaluating_in_pieces_gives_the_loss_of_a_cpu(data_dir, tmp_path, device, capsys):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    texts = str(data_dir.parent / "texts")
    found = {}
    for name in ("cpu", device.type):
        for pieces in ((), ("--context-length", "16")):
            words = ["evaluate", str(tmp_path / "model"), "--data", texts, "--device", name, "--json"]
            assert main([*words, *pieces]) == 0
            found[name, pieces] = json.loads(capsys.readouterr().out)
            assert found[name, pieces]["loss"] == pytest.approx(found["cpu", pieces]["loss"], rel=1e-4)
    whole, cut = (found["cpu", pieces]["loss"] for pieces in ((), ("--context-length", "16")))
    assert abs(whole - cut) > 1e-3


@pytest.mark.usefixtures("two_gpus")
def test_an_experiment_has_a_run_on_each_gpu(data_dir, tmp_path, device):
    pytest.importorskip("matplotlib")
    parallel = []
    if device.type == "cuda":
        slots = default_slots(None, None)
        assert len({slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots}) == len(slots) >= 2
    else:
        parallel = ["--parallel", "2"]
    file, out = write(tmp_path, TINY.replace('"cpu"', f'"{device.type}"')), tmp_path / "out"
    words = ["experiment", "run", file, "--data", str(data_dir), "--out", str(out), *parallel]
    assert main(words) == 0
    for arm in read_results(out).arms:
        (run,) = arm.runs
        assert run.metrics.steps == 4
        assert json.loads((run.directory / "config.json").read_text())["training"]["device"] == device.type
    numbers = json.loads((out / "summary.json").read_text())["arms"]
    assert all(len(arm["evaluation"]) == 1 for arm in numbers.values()) and len(numbers) == 2
