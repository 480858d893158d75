"""The runner's schedule, resumption and endings; a stub that takes milliseconds stands for the trainer."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from rich.console import Console

from switchmamba.data.prepare import prepare
from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.experiments.environment import corpus, corpus_sha256
from switchmamba.experiments.processes import Place, Processes, Slot, cpu_slots, default_slots, train_command
from switchmamba.experiments.progress import sentence, table
from switchmamba.experiments.results import RECORD, ExperimentRecord, read_results
from switchmamba.experiments.run_files import log_path, run_directory
from switchmamba.experiments.runner import RunStatus, require_choices, run_experiment, run_experiments
from switchmamba.experiments.spec import Experiment
from tests.experiments import stub_trainer
from tests.experiments.synthetic import comparison, power_law, write_run

RATE = "training.learning_rate"
ONE_ARM = {"mamba": {"preset": "mamba-demo"}}
STUB = (sys.executable, str(Path(stub_trainer.__file__)))


def small(**changes: Any) -> Experiment:
    tables = {"sweep": {"training.learning_rate": [1.0, 2.0]}, "seeds": [0, 1], "set": {"training.steps": 5}}
    return comparison(**(tables | changes))


def run(
    experiment: Experiment, directory: Path, *, parallel: int = 2, keep_going: bool = True, **told: str
) -> list[list[RunStatus]]:
    made = {"data": "D", "corpus": "", "hardware": "", "software": "", "command": "switchmamba", **told}
    record = ExperimentRecord(experiment=experiment, threads=1, **made)
    seen: list[list[RunStatus]] = []

    def observe(statuses: Sequence[RunStatus]) -> None:
        seen.append(list(statuses))

    slots = cpu_slots(parallel, 3)
    run_experiment(record, directory, slots, observe=observe, keep_going=keep_going, program=STUB)
    return seen


def starts(directory: Path) -> dict[str, list[str]]:
    """First step of each start of each run."""
    root = directory / "runs"
    return {
        path.parent.relative_to(root).as_posix(): [line.split()[0] for line in path.read_text().splitlines()]
        for path in sorted(root.rglob("starts"))
    }


def test_the_search_is_run_and_then_the_other_seeds_at_its_choice(tmp_path: Path) -> None:
    seen = run(small(), tmp_path)
    assert starts(tmp_path) == {
        f"{arm}/learning_rate={rate}/seed={seed}": ["1"]
        for arm in ("mamba", "moe-mamba")
        for rate, seed in ((1, 0), (2, 0), (2, 1))
    }
    assert not read_results(tmp_path).unfinished
    assert max(sum(status.state == "running" for status in statuses) for statuses in seen) == 2
    assert {status.state for status in seen[-1]} == {"finished"}
    assert len(seen[-1]) == 6


def test_a_run_gets_the_threads_of_its_slot(tmp_path: Path) -> None:
    run(small(seeds=[0]), tmp_path)
    assert (tmp_path / "runs/mamba/learning_rate=1/seed=0/starts").read_text() == "1 3 0\n"


def test_a_finished_experiment_starts_nothing(tmp_path: Path) -> None:
    run(small(), tmp_path)
    before = starts(tmp_path)
    run(small(), tmp_path)
    assert starts(tmp_path) == before


def test_only_what_is_missing_is_run_and_a_half_finished_run_continues(tmp_path: Path) -> None:
    run(small(), tmp_path)
    half = tmp_path / "runs/moe-mamba/learning_rate=2/seed=1"
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:3]))
    (half / "checkpoints/step-5").rmdir()
    run(small(seeds=[0, 1, 2]), tmp_path)
    again = starts(tmp_path)
    assert again.pop("moe-mamba/learning_rate=2/seed=1") == ["1", "4"]
    assert again.pop("mamba/learning_rate=2/seed=2") == ["1"]
    assert again.pop("moe-mamba/learning_rate=2/seed=2") == ["1"]
    assert set(map(tuple, again.values())) == {("1",)}


def test_a_failure_ends_with_the_runs_last_error_after_everything_else_was_done(tmp_path: Path) -> None:
    arms = {"mamba": {"preset": "mamba-demo", "sweep": {"training.learning_rate": [8.0]}}}
    arms |= {"moe-mamba": {"preset": "moe-mamba-demo"}}
    with pytest.raises(SwitchMambaError) as failed:
        run(small(arms=arms), tmp_path)
    assert "1 run failed; mamba/learning_rate=8/seed=0: no space left on device" in str(failed.value)
    assert failed.value.exit_code == 1
    assert len([name for name in starts(tmp_path) if name.startswith("moe-mamba")]) == 3


def test_without_keep_going_a_failure_stops_the_others_and_they_save(tmp_path: Path) -> None:
    arms = {"mamba": {"preset": "mamba-demo", "sweep": {"training.learning_rate": [8.0]}}}
    arms |= {"moe-mamba": {"preset": "moe-mamba-demo"}}
    experiment = small(arms=arms, set={"training.steps": 500})
    began = time.monotonic()
    with pytest.raises(SwitchMambaError, match="no space left"):
        run(experiment, tmp_path, keep_going=False)
    assert time.monotonic() - began < 4
    assert len(list((tmp_path / "runs/moe-mamba/learning_rate=1/seed=0/checkpoints").iterdir())) == 1


def test_a_run_that_diverges_is_passed_over(tmp_path: Path) -> None:
    experiment = small(sweep={"training.learning_rate": [1.0, 9.0]})
    run(experiment, tmp_path)
    arm = read_results(tmp_path).arm("mamba")
    assert [result.run.name for result in arm.runs] == [
        "mamba/learning_rate=1/seed=0",
        "mamba/learning_rate=1/seed=1",
    ]
    before = starts(tmp_path)
    run(experiment, tmp_path)
    assert starts(tmp_path) == before


def test_runs_of_seeds_that_are_no_longer_asked_for_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(small(), tmp_path)
    run(small(), tmp_path)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "switchmamba"):
        run(small(seeds=[0]), tmp_path)
    assert "2 of the runs in" in caplog.text
    assert "mamba/learning_rate=2/seed=1" in caplog.text


def test_an_arm_that_only_diverges_has_no_result(tmp_path: Path) -> None:
    run(small(sweep={"training.learning_rate": [9.0]}), tmp_path)
    with pytest.raises(SwitchMambaError, match="arm mamba: every run of its search diverged"):
        require_choices(tmp_path)


def test_a_run_that_is_killed_leaves_a_reason(tmp_path: Path) -> None:
    with pytest.raises(SwitchMambaError, match="ended by signal 9"):
        run(small(sweep={"training.learning_rate": [7.0]}, seeds=[0]), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_it_is_stopped_every_run_saves_and_the_rest_waits(
    tmp_path: Path, number: signal.Signals
) -> None:
    experiment = small(set={"training.steps": 1000})
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    began = time.monotonic()
    statuses = run(experiment, tmp_path)[-1]
    assert time.monotonic() - began < 6
    assert [status.state for status in statuses].count("waiting") == 4
    assert len(starts(tmp_path)) == 2
    for name in starts(tmp_path):
        (saved,) = (tmp_path / "runs" / name / "checkpoints").iterdir()
        assert 0 < int(saved.name.removeprefix("step-")) < 1000


def test_a_configuration_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mamba/learning_rate=1/seed=0 .*unknown key training.stepz"):
        run(small(set={"training.stepz": 5}), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"validate_every = 0 measures no held-out loss"):
        run(small(set={"training.validate_every": 0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_of_two_lengths_are_not_mixed(tmp_path: Path) -> None:
    one = small(arms=ONE_ARM, expect=[], seeds=[0], sweep={RATE: [1.0]})
    run(one, tmp_path)
    record = (tmp_path / "experiment.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"was begun with training.steps = 5, the experiment asks for 9; give"
    ):
        run(
            small(arms=ONE_ARM, expect=[], seeds=[0], sweep={RATE: [1.0]}, set={"training.steps": 9}),
            tmp_path,
        )
    assert (tmp_path / "experiment.json").read_bytes() == record


def test_runs_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run(small(arms=ONE_ARM, expect=[], seeds=[0], sweep={RATE: [1.0]}), tmp_path)
    other = {"training.steps": 5, "training.weight_decay": 0.3}
    with pytest.raises(
        ConfigError, match=r"begun with other settings: training.weight_decay \(was 0.1, is 0.3\)"
    ):
        run(small(arms=ONE_ARM, expect=[], seeds=[0], sweep={RATE: [1.0]}, set=other), tmp_path)
    run(small(arms=ONE_ARM, expect=[], seeds=[0, 1], sweep={RATE: [1.0, 2.0]}), tmp_path)
    assert len(starts(tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"corpus": "Text: 2 documents."},
            "read other text than --data D.*there 1 document, here 2 documents",
        ),
        ({"corpus_sha256": "b"}, "read other text than --data D.*as much, but in another order"),
        ({"name": "other"}, "holds experiment beats-mamba, not other; give another --out"),
    ],
)
def test_other_text_and_another_experiment_are_refused_where_runs_are(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    run(small(), tmp_path, corpus="Text: 1 document.", corpus_sha256="a")
    before = (tmp_path / RECORD).read_bytes()
    named = {key: value for key, value in change.items() if key == "name"}
    same = {"corpus": "Text: 1 document.", "corpus_sha256": "a"}
    told = same | {key: value for key, value in change.items() if key != "name"}
    with pytest.raises(ConfigError, match=message):
        run(
            small(arms={"more": {"preset": "mamba-demo"}}, baseline="more", expect=[], **named),
            tmp_path,
            **told,
        )
    assert (tmp_path / RECORD).read_bytes() == before


def test_a_record_that_names_its_text_in_words_alone_gets_no_hash_of_text_that_nobody_compared(
    tmp_path: Path,
) -> None:
    run(small(seeds=[0]), tmp_path)
    run(small(seeds=[0, 1]), tmp_path, corpus_sha256="a")
    assert read_results(tmp_path).record.corpus_sha256 is None


def test_the_hash_of_a_text_knows_the_order_of_its_documents(tmp_path: Path) -> None:
    for name, texts in {
        "a": ["one two", "three"],
        "b": ["three", "one two"],
        "c": ["one two", "three"],
    }.items():
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_text(text)
        (tmp_path / "held-out.txt").write_text("four")
        prepare(
            [tmp_path / name],
            "bpe:257",
            tmp_path / f"data-{name}",
            validation_inputs=[tmp_path / "held-out.txt"],
        )
    words = {corpus(tmp_path / f"data-{name}") for name in "abc"}
    a, b, c = (corpus_sha256(tmp_path / f"data-{name}") for name in "abc")
    assert len(words) == 1
    assert a == c
    assert a != b


def test_what_an_experiment_went_on_with_stands_beside_what_it_began_on(tmp_path: Path) -> None:
    run(small(seeds=[0]), tmp_path, hardware="a laptop")
    run(small(seeds=[0]), tmp_path, hardware="a GPU")
    assert read_results(tmp_path).record.hardware == "a laptop"  # nothing was left to run
    for hardware in ("a GPU", "a laptop"):
        shutil.rmtree(tmp_path / "runs/mamba/learning_rate=1/seed=0")
        run(small(seeds=[0]), tmp_path, hardware=hardware)
        assert read_results(tmp_path).record.hardware == "a laptop; and later a GPU"


def test_a_second_process_in_the_directory_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    experiments = [small(name="first"), small(name="second")]
    run_both(experiments, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob(RECORD)}
    hold = (
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", f"import fcntl, os, sys; {hold}", str(tmp_path / "second")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="second is being run by another process; wait for it"):
            run_both(experiments, tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob(RECORD)} == before
        other.kill()
    run_both(experiments, tmp_path)  # who held it is gone


def test_the_log_of_a_run_holds_what_it_said(tmp_path: Path) -> None:
    experiment = small(sweep={"training.learning_rate": [1.0, 9.0]}, seeds=[0])
    run(experiment, tmp_path)
    log = log_path(tmp_path, experiment.candidates("mamba")[1])
    assert log == run_directory(tmp_path, experiment.candidates("mamba")[1]).with_name("seed=0.log")
    assert log.read_text().startswith("error: the loss is nan")


def test_cores_are_divided_among_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchmamba.experiments.processes.available_cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    counts = {given: default_slots(*given) for given in ((None, None), (2, None), (None, 4), (3, 1))}
    assert {given: (len(slots), slots[0].threads) for given, slots in counts.items()} == {
        (None, None): (8, 1),
        (2, None): (2, 4),
        (None, 4): (2, 4),
        (3, 1): (3, 1),
    }


def test_one_run_has_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in default_slots(None, None)] == ["0", "1", "2"]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in default_slots(4, 1)] == ["0", "1", "2", "0"]


def test_only_gpus_that_this_process_sees_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in default_slots(None, None)] == ["5", "7"]


def test_progress_shows_step_loss_speed_time_left_and_load() -> None:
    (one,) = comparison(seeds=[0], sweep={}).candidates("moe-mamba")
    line = {"step": 20, "tokens": 200, "loss": 3.2, "loss_ema": 3.25, "tokens_per_second": 100.0}
    line |= {"routers": [{"fraction": [0.5, 0.5], "largest_load": 1.0}], "validation_loss": 3.5}
    status = RunStatus(one, one.name, "running", 50, line, 3.5)
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table([status], 150))
    for text in ("moe-mamba/seed=0", "20/50", "3.250", "3.500", "100", "0:00:03", "▅▅"):
        assert text in captured.get()
    assert sentence(status).startswith("moe-mamba/seed=0: running, step 20/50  loss 3.200")


def run_both(
    experiments: Sequence[Experiment], directory: Path, **options: Any
) -> dict[str, Sequence[RunStatus]]:
    record = {
        "data": "D",
        "corpus": "",
        "hardware": "",
        "software": "",
        "threads": 1,
        "command": "switchmamba",
    }
    seen: dict[str, Sequence[RunStatus]] = {}
    run_experiments(
        [(ExperimentRecord(experiment=e, **record), directory / e.name) for e in experiments],
        cpu_slots(2, 1),
        observe=lambda statuses: seen.update(last=statuses),
        analyse=True,
        program=STUB,
        **options,
    )
    return seen


def test_a_run_that_two_experiments_share_is_trained_once_and_counts_in_both(tmp_path: Path) -> None:
    arms = {"other": {"preset": "moe-mamba-demo"}, "mamba": {"preset": "mamba-demo"}}
    second = small(name="second", arms=arms, expect=[], sweep={"training.learning_rate": [2.0]})
    seen = run_both([small(name="first"), second], tmp_path)
    assert len(starts(tmp_path / "first")) == 6
    assert starts(tmp_path / "second") == {}
    result = read_results(tmp_path / "second")
    assert not result.unfinished
    assert [run.metrics.final_loss for run in result.arm("other").runs] == [3.0, 3.0]
    assert "second/other/learning_rate=2/seed=1" in {status.name for status in seen["last"]}
    assert {status.state for status in seen["last"]} == {"finished"}


def test_a_shared_run_that_diverges_has_diverged_in_both(tmp_path: Path) -> None:
    sweep = {"training.learning_rate": [1.0, 9.0]}
    run_both([small(name="first", sweep=sweep), small(name="second", sweep=sweep)], tmp_path)
    assert starts(tmp_path / "second") == {}
    arm = read_results(tmp_path / "second").arm("mamba")
    assert [result.diverged for result in arm.candidates] == [False, True]


def test_a_run_on_its_way_is_not_trained_again_for_a_search_that_names_it_later(tmp_path: Path) -> None:
    """The second experiment knows its choice, and trains its second seed, before the first, which stands before it."""
    first, second = (
        small(name=name, arms=ONE_ARM, expect=[], set={RATE: 1.0}, sweep={"training.steps": steps})
        for name, steps in (("first", [100, 180]), ("second", [100]))
    )
    run_both([first, second], tmp_path)
    begun = [starts(tmp_path / e.name).get("mamba/steps=100/seed=1") for e in (first, second)]
    assert sorted(map(str, begun)) == ["None", "['1']"]
    assert not read_results(tmp_path / "first").unfinished
    assert not read_results(tmp_path / "second").unfinished


def test_of_two_halves_of_a_shared_run_the_further_one_goes_on(tmp_path: Path) -> None:
    both = [
        small(name=name, arms=ONE_ARM, expect=[], sweep={}, seeds=[0], set={"training.steps": 20, RATE: 1.0})
        for name in ("first", "second")
    ]
    for experiment, taken in zip(both, (3, 7), strict=True):
        (one,) = experiment.candidates("mamba")
        write_run(tmp_path / experiment.name, one, power_law, steps=20, taken=taken)
    run_both(both, tmp_path)
    assert starts(tmp_path / "first") == {}
    assert starts(tmp_path / "second") == {"mamba/seed=0": ["8"]}
    assert not read_results(tmp_path / "first").unfinished


def test_of_some_arms_only_theirs_are_trained_and_the_others_follow(tmp_path: Path) -> None:
    seen = run_both([small(name="first")], tmp_path, arms=["mamba"])
    assert {name.split("/")[0] for name in starts(tmp_path / "first")} == {"mamba"}
    assert len(seen["last"]) == 3
    run_both([small(name="first")], tmp_path)
    assert set(map(tuple, starts(tmp_path / "first").values())) == {("1",)}
    assert not read_results(tmp_path / "first").unfinished


def test_the_twin_of_a_run_that_was_asked_for_is_trained_in_its_stead_if_it_has_come_further(
    tmp_path: Path,
) -> None:
    arms = {"other": {"preset": "mamba-demo"}}
    first, second = (
        small(name=name, expect=[], sweep={}, seeds=[0], set={"training.steps": 20, RATE: 1.0}, **more)
        for name, more in (("first", {"arms": ONE_ARM}), ("second", {"arms": arms, "baseline": "other"}))
    )
    write_run(tmp_path / "first", first.candidates("mamba")[0], power_law, steps=20, taken=7)
    seen = run_both([first, second], tmp_path, arms=["other"])
    assert starts(tmp_path / "first") == {"mamba/seed=0": ["8"]}
    assert starts(tmp_path / "second") == {}
    assert len(read_results(tmp_path / "second").arm("other").runs) == 1
    assert {status.name for status in seen["last"]} == {"first/mamba/seed=0", "second/other/seed=0"}


def test_a_run_is_analysed_only_when_its_process_has_ended(tmp_path: Path) -> None:
    experiment = small(name="first", seeds=[0], sweep={RATE: [2.0, 4.0]}, arms=ONE_ARM, expect=[])
    run_both([experiment], tmp_path)
    assert len(list(tmp_path.rglob("analysis/**/*.json"))) == 2


def test_on_a_gpu_a_run_is_analysed_while_the_next_one_trains() -> None:
    slots = [Slot({}, 1, gpu=True)]
    one, two = small(seeds=[0]).candidates("mamba")
    sleep = (sys.executable, "-c", "import time; time.sleep(30)")
    with TemporaryDirectory() as directory, Processes(sleep, slots) as processes:
        processes.start(Place(Path(directory), "D", one), "analyse")
        assert processes.has_room("train")
        assert not processes.has_room("analyse")
        processes.start(Place(Path(directory), "D", two), "train")
        assert not processes.has_room("train")


def test_finished_runs_are_analysed_and_then_their_checkpoints_go(tmp_path: Path) -> None:
    experiment = small(name="first", seeds=[0])
    run_both([experiment], tmp_path, discard_checkpoints=True)
    directory = tmp_path / "first"
    assert not list(directory.rglob("checkpoints"))
    assert len(list(directory.rglob("analysis/**/*.json"))) == 4
    assert not read_results(directory).unfinished
    before = starts(directory)
    run_both([experiment], tmp_path, discard_checkpoints=True)
    assert starts(directory) == before


def test_checkpoints_that_a_killed_experiment_did_not_come_to_remove_go_the_next_time(tmp_path: Path) -> None:
    experiment = small(name="first", seeds=[0])
    run_both([experiment], tmp_path)
    assert len(list(tmp_path.rglob("checkpoints"))) == 4
    before = starts(tmp_path / "first")
    run_both([experiment], tmp_path, discard_checkpoints=True)
    assert not list(tmp_path.rglob("checkpoints*"))
    assert starts(tmp_path / "first") == before


def test_an_analysis_that_ends_without_an_answer_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    experiment = small(name="first", seeds=[0], sweep={RATE: [5.0]}, arms=ONE_ARM, expect=[])
    with pytest.raises(SwitchMambaError, match="ended with exit code 0 before its last answer"):
        run_both([experiment], tmp_path, discard_checkpoints=True)
    assert len(list(tmp_path.rglob("checkpoints"))) == 1


def test_an_analysis_that_fails_is_named_and_the_run_stays(tmp_path: Path) -> None:
    experiment = small(name="first", seeds=[0], sweep={"training.learning_rate": [6.0]})
    with pytest.raises(SwitchMambaError, match=r"2 runs failed; .*the data is gone"):
        run_both([experiment], tmp_path, discard_checkpoints=True)
    assert len(list(tmp_path.rglob("checkpoints"))) == 2


def test_the_command_of_a_run_is_one_line_for_a_shell() -> None:
    (one,) = comparison(seeds=[1], sweep={}, set={"training.steps": 3}).candidates("mamba")
    assert train_command(one, "my data", "out", 2) == (
        "switchmamba train mamba-demo --data 'my data' --out out --threads 2 --resume "
        "--training.steps 3 --training.seed 1"
    )
