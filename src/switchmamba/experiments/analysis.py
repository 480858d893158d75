"""What finished runs are asked once: loss on all held-out text, what experts specialise in, how well a model copies."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydantic import Field, ValidationError
from torch import Tensor

from switchmamba.checkpoint import newest_valid, step_number
from switchmamba.config import Config
from switchmamba.data.sampler import every_target_once
from switchmamba.data.shards import TokenShards
from switchmamba.errors import CheckpointError, ConfigError, DataError
from switchmamba.evaluation.perplexity import Evaluation, evaluate
from switchmamba.evaluation.repeats import Repeats, repeats
from switchmamba.evaluation.specialisation import LayerProfile, specialisation
from switchmamba.experiments.results import RunResult, due_runs, read_results, read_run
from switchmamba.experiments.run_files import analysis_path, is_analysed, saved_step, write_whole
from switchmamba.experiments.spec import Run
from switchmamba.models.loading import load_verified

SPECIALISATION_TOKENS = 65_536
"""Held-out tokens that the experts' profiles are read from: enough to judge tokens that come once in a thousand."""

REPEATED_SPANS = 32
"""Repeats that are planted for each gap."""

REPEATS_TOKENS = 32_768
"""Held-out tokens that are searched for repeats of their own."""

Progress = Callable[[int, int | None], None]
"""Told how many tokens are done, and of how many if that is known; from the start for each of the questions."""

Watch = Callable[[Run], AbstractContextManager[Progress]]
"""Entered with a run while it is asked."""


def _unwatched(_run: Run) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


class RunAnalysis(Config):
    """The answers of one run, kept in ``analysis/<run name>.json``.

    Attributes:
        step: of the checkpoint that was asked.
        evaluation: on all held-out documents, each from an empty state.
        specialisation: a profile for each layer with a router.
        repeats: what it makes of text that comes a second time; None from before this was asked.
    """

    step: int
    evaluation: Evaluation
    specialisation: list[LayerProfile] = Field(default_factory=list)
    repeats: Repeats | None = None


def analyse(directory: Path, name: str | None = None, watch: Watch = _unwatched) -> None:
    """Ask every run of the experiment in ``directory`` that counts and was not asked yet, each inside ``watch``.

    With ``name`` ask that run alone, whether it counts or not.
    Raises :class:`DataError` if the data that the experiment was run on is gone, :class:`ConfigError` if no finished
    run has that name, :class:`CheckpointError` if the checkpoint of a run's last step is damaged.
    """
    results = read_results(directory)
    counting = [result for arm in results.arms for result in arm.runs]
    if name is not None:
        runs = [read_run(directory, run) for run in due_runs(results.experiment, directory)]
        counting = [result for result in runs if result.run.name == name and result.finished]
        if not counting:
            raise ConfigError(
                f"{directory} has no finished run {name!r}; its runs lie in {directory / 'runs'}"
            )
    for result in counting:
        if not is_analysed(directory, result.run):
            path = analysis_path(directory, result.run)
            path.parent.mkdir(parents=True, exist_ok=True)
            with watch(result.run) as progress:
                answers = _ask(result, Path(results.record.data), progress)
            write_whole(path, answers.model_dump_json(indent=1) + "\n")


def read_analysis(directory: Path, run: Run) -> RunAnalysis | None:
    """Read a run's answers; None if it was not asked yet."""
    path = analysis_path(directory, run)
    if not path.is_file():
        return None
    try:
        return RunAnalysis.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise DataError(f"{path}: not an analysis ({problem}); remove it to have it made again") from None


def _ask(result: RunResult, data: Path, progress: Progress) -> RunAnalysis:
    assert result.config is not None
    step, checkpoint = saved_step(result.directory), newest_valid(result.directory)
    if step_number(checkpoint) < step:
        raise CheckpointError(
            f"{result.directory}: the checkpoint of its last step, {step}, is damaged; remove it, and run the "
            f"experiment with --resume to train on from step {step_number(checkpoint)}"
        )
    model, tokenizer = load_verified(checkpoint, device=result.config["training"]["device"])
    # An experiment that trains a model which looks ahead has accepted it; its own note says what that means.
    context = int(result.config["data"]["context_length"])
    evaluation = evaluate(
        model, tokenizer, data, context_length=context, allow_non_causal=True, progress=progress
    )
    batches = held_out_batches(data, context, SPECIALISATION_TOKENS, model.device.type, progress)
    profiles = specialisation(model, tokenizer, batches)
    copied = repeats(
        model,
        tokenizer,
        data,
        context_length=context,
        spans=REPEATED_SPANS,
        max_tokens=REPEATS_TOKENS,
        allow_non_causal=True,
        progress=progress,
    )
    return RunAnalysis(step=step, evaluation=evaluation, specialisation=profiles, repeats=copied)


def held_out_batches(
    data: Path, context_length: int, most_tokens: int, device: str, progress: Progress | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Iterate over (tokens (B, L), document_ids (B, L)) of the validation split, until ``most_tokens`` have come."""
    seen, shards = 0, TokenShards.open(data, "validation")
    total = min(most_tokens, shards.num_tokens - 1)  # the first token is no target
    for batch in every_target_once(shards, context_length, 8, reset_state=True):
        assert batch.document_ids_BL is not None
        yield batch.tokens_BL.to(device), batch.document_ids_BL.to(device)
        seen += batch.tokens_BL.numel()
        if progress is not None:
            progress(min(seen, total), total)
        if seen >= most_tokens:
            return
