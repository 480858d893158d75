"""The demo: from nothing to a report in minutes, on text that is on every machine.

    corpus → tokenizer and shards → MoE-Mamba beside its matched Mamba → evaluation → sample → report

Every stage leaves its result in the demo's directory, and is skipped when that is there already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from switchmamba.config import validate
from switchmamba.data.index import INDEX_FILE
from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.experiments import environment
from switchmamba.experiments.library_text import prepare_library_text
from switchmamba.experiments.processes import cpu_slots, default_slots
from switchmamba.experiments.report import Report, Sample
from switchmamba.experiments.results import RECORD, ExperimentRecord, Results, read_results
from switchmamba.experiments.run_files import is_analysed
from switchmamba.experiments.runner import Observe, require_choices, resolve_run, run_experiment
from switchmamba.experiments.spec import Experiment, Override, restrict
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.loading import load

PROMPT = "class Stack:\n    "
SAMPLE_TOKENS = 200

_CALIBRATION_STEPS = 10
_MOST_THREADS = 8
"""Per run: models this small gain nothing from more."""


@dataclass(frozen=True)
class DemoEvents:
    """Who watches the demo.

    Attributes:
        stage: told what begins, and whether its result was there already.
        runs: told how training stands.
        text: given the sample piece by piece.
    """

    stage: Callable[[str, bool], None]
    runs: Observe
    text: Callable[[str], None]


def run_demo(
    out: Path, events: DemoEvents, *, minutes: float | None = None, steps: int | None = None
) -> Path | None:
    """Run or continue the demo in ``out`` and return the path of its report.

    Args:
        out: a directory that is new, empty, or a demo's.
        events: who watches.
        minutes: of training, by a short measurement of this machine's speed; default: the presets' steps.
        steps: of each run, instead.

    Returns None if SIGTERM or Ctrl-C stopped it: what was done so far is kept.
    Raises :class:`ConfigError` for a directory of something else, or of a demo of another length.
    """
    _require_demo_directory(out)
    data = out / "data"
    _prepare_data(out, data, events)
    experiment = _experiment(out, steps)
    if minutes is not None and not (out / RECORD).is_file():
        experiment = _fitted(experiment, data, minutes, events)
    if not _train(experiment, data, out, events):
        return None
    results = read_results(out)
    events.stage("What MoE-Mamba writes", False)
    sample = _sample(results, events)
    report = out / "report.html"
    Report(results, title="MoE-Mamba against Mamba, in minutes", sample=sample).write(report)
    return report


def demo_experiment() -> Experiment:
    """Return the demo's experiment file as it comes with the package."""
    import tomllib

    source = files(__package__) / "demo.toml"
    return validate(Experiment, tomllib.loads(source.read_text(encoding="utf-8")), "demo.toml")


def _require_demo_directory(out: Path) -> None:
    known = {"corpus", "data", "runs", "analysis", RECORD, "report.html", "summary.json"}
    unfinished = ("data.tmp-", f"{RECORD}.tmp")  # what a killed demo leaves; the next one removes it
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is not a directory; name another one")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if name not in known and not name.startswith(unfinished)]
    if foreign:
        raise ConfigError(f"{out} holds {foreign[0]}, which no demo wrote; name a new directory")


def _prepare_data(out: Path, data: Path, events: DemoEvents) -> None:
    ready = (data / INDEX_FILE).is_file()
    events.stage("Preparing text: the standard library's modules and help topics", ready)
    if not ready:
        prepare_library_text(out / "corpus", data)


def _experiment(out: Path, steps: int | None) -> Experiment:
    """Return the experiment at the asked length; a demo that was begun keeps the length it has."""
    if not (out / RECORD).is_file():
        return restrict(demo_experiment(), None, _length(steps))
    begun = read_results(out).experiment
    if steps is not None and begun != restrict(demo_experiment(), None, _length(steps)):
        raise ConfigError(
            f"{out} holds a demo of another length; leave --steps out to continue it, or name a new directory"
        )
    return begun


def _length(steps: int | None) -> list[Override]:
    if steps is None:
        return []
    # A warm-up longer than a tenth of a shortened run would be most of it.
    return [("training.steps", steps), ("training.warmup_steps", max(1, steps // 10))]


def _fitted(experiment: Experiment, data: Path, minutes: float, events: DemoEvents) -> Experiment:
    """Return the experiment with as many steps as both runs together take in ``minutes`` here."""
    events.stage(f"Measuring how many steps fit into {minutes:g} minutes", False)
    probe = restrict(experiment, None, _length(_CALIBRATION_STEPS))
    with TemporaryDirectory() as place:
        if not _run(probe, data, Path(place), lambda statuses: None):
            raise SwitchMambaError(
                "stopped while measuring this machine's speed; nothing is lost: start again"
            )
        results = read_results(Path(place))
        slowest = min(float(arm.runs[0].metrics.tokens_per_second_S[2:].mean()) for arm in results.arms)
        tokens_per_step = results.baseline.runs[0].metrics.tokens / _CALIBRATION_STEPS
    steps = max(20, int(minutes * 60 * slowest / tokens_per_step) // 10 * 10)
    return restrict(experiment, None, _length(steps))


def _train(experiment: Experiment, data: Path, out: Path, events: DemoEvents) -> bool:
    steps = resolve_run(experiment.candidates(experiment.baseline)[0]).training.steps
    results = read_results(out) if (out / RECORD).is_file() else None
    done = (
        results is not None
        and not results.unfinished
        and all(is_analysed(out, run.run) for arm in results.arms for run in arm.runs)
    )
    events.stage(
        f"Training Mamba and MoE-Mamba side by side, {steps:,} steps each, then evaluating them on held-out modules",
        done,
    )
    return done or _run(experiment, data, out, events.runs, analyse=True)


def _run(experiment: Experiment, data: Path, out: Path, observe: Observe, *, analyse: bool = False) -> bool:
    import torch

    threads = min(_MOST_THREADS, max(1, environment.available_cores() // 2))
    slots = default_slots(None, None) if torch.cuda.is_available() else cpu_slots(2, threads)
    record = ExperimentRecord(
        experiment=experiment,
        data=str(data),
        corpus=f"Text: modules of Python's standard library and its help topics, {environment.corpus(data)}",
        corpus_sha256=environment.corpus_sha256(data),
        hardware=environment.hardware(),
        software=environment.software(),
        threads=threads,
        command=f"switchmamba demo --out {out}",
    )
    finished = run_experiment(record, out, slots, observe=observe, keep_going=False, analyse=analyse)
    if finished:
        require_choices(out)
    return finished


def _sample(results: Results, events: DemoEvents) -> Sample:
    arm = next(arm for arm in results.arms if arm.name != results.experiment.baseline)
    model, tokenizer = load(arm.runs[0].directory)
    settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=0)
    events.text(PROMPT)
    pieces: list[str] = []
    for piece in generate(model, tokenizer, [PROMPT], settings, max_tokens=SAMPLE_TOKENS):
        events.text(piece.text)
        pieces.append(piece.text)
    how = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, seed {settings.seed}"
    return Sample(prompt=PROMPT, continuation="".join(pieces), model=arm.label, how=how)
