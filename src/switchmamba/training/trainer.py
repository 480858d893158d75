"""Training, from a configuration and token shards to a run directory that can be continued at any moment.

A run directory holds ``config.json`` (resolved), ``metrics.jsonl`` (one line a step) and
``checkpoints/step-N/``, where N steps are done. Order of events in a step: batch, update, validation if
due, line of metrics, checkpoint if due. A checkpoint is published only when the lines up to its step are
on the disk, and a resumed run cuts off the lines after it; so every step stands once, and on one CPU with
a fixed number of threads the continued run equals the uninterrupted one bit for bit, but for its timings.
"""

import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.extras import require
from switchmamba.models.accounting import account
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import WEIGHTS, copy_weights, read_chat_template
from switchmamba.models.lora import add_lora
from switchmamba.training.balance import at_step, changes_with_steps, next_factor, set_capacity
from switchmamba.training.checkpoint import (
    CheckpointWriter,
    Position,
    Saved,
    check_data,
    find_checkpoint,
    find_initial,
    require_optimizer,
    restore,
    restore_weights,
    seed_generators,
    set_aside_newer,
)
from switchmamba.training.config import RunConfig, differences, resolve
from switchmamba.training.inputs import Inputs
from switchmamba.training.metrics import Line, MetricsLog, SmoothedLoss, last_step, router_metrics
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.parts import freeze
from switchmamba.training.progress import Observer, PlainProgress
from switchmamba.training.schedule import learning_rate
from switchmamba.training.step_graph import StepGraph
from switchmamba.training.stop import StopRequest, stop_on_signals
from switchmamba.training.tensorboard import TensorBoard
from switchmamba.training.train_step import LaunchedStep, StepResult, launch_step, train_step
from switchmamba.training.utilisation import mfu, peak_flops, peak_memory
from switchmamba.training.validation import validate

logger = logging.getLogger("switchmamba")


@dataclass(frozen=True)
class TrainingResult:
    """How a call of :func:`train` ended: steps taken in all, and whether those are all that were asked."""

    step: int
    finished: bool


def train(
    config: RunConfig,
    data_dir: Path,
    run_dir: Path,
    *,
    resume: bool = False,
    vocab_size: int | None = None,
    observer: Observer | None = None,
    stop: StopRequest | None = None,
) -> TrainingResult:
    """Train ``config`` on ``data_dir`` and leave everything in ``run_dir``.

    Args:
        config: as read; its "auto" values are resolved here, and ``vocab_size`` takes its vocabulary's place.
        data_dir: what ``switchmamba data prepare`` wrote.
        run_dir: must be new or an empty directory, unless ``resume``.
        resume: continue from the newest valid checkpoint; from the start if there is none; do nothing if
            it is done.
        vocab_size: of the model; None: as many as the data's tokenizer has. It may be larger, never smaller.
        observer: who is told of each step; by default a logger, every ``training.log_every`` steps.
        stop: looked at after each step: training saves and returns. By default SIGTERM and SIGINT ask for it.

    Raises:
        ConfigError: the run exists, has lost its checkpoints, or differs from ``config`` in more than it may; or the
            initial checkpoint is of another model.
        DataError: the data cannot be used, or is not what the run was begun with, or has another tokenizer than the
            initial checkpoint.
        CheckpointError: every checkpoint of the run, or the initial one, is damaged.
        NonFiniteError: NaN or infinity; neither weights nor checkpoints have seen it.
    """
    if not resume and run_dir.exists() and not is_empty_directory(run_dir):
        raise ConfigError(f"{run_dir} exists; --resume continues it, or choose another --out")
    if config.training.lora is not None:
        require("peft", "lora", "training.lora")
    inputs = Inputs.open(data_dir, config)
    vocab_size = check_vocabulary(vocab_size, inputs.tokenizer.vocab_size)
    config = resolve(config, vocab_size, choose_device(config.training.device))
    observers: list[Observer] = [observer or PlainProgress(config.training.log_every)]
    with ExitStack() as stack:
        if config.training.tensorboard:
            observers.append(stack.enter_context(closing(TensorBoard(run_dir / "tensorboard"))))
        saved, initial = find_checkpoint(run_dir), None
        if saved is None:
            if resume:
                start_afresh(run_dir)
            inputs.verify()
            if config.training.initial_checkpoint is not None:
                initial = find_initial(
                    Path(config.training.initial_checkpoint), config.model, inputs.tokenizer
                )
            report_cuts(inputs)
        warn_of_warmup(config)

        stop = stop or stack.enter_context(stop_on_signals())
        new = not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = stack.enter_context(MetricsLog(run_dir / "metrics.jsonl"))
        if saved is not None:
            check_resumable(saved, config, inputs)
            if saved.position.step >= config.training.steps:
                return TrainingResult(saved.position.step, finished=True)
            require_optimizer(saved)

        write_config(run_dir, config)
        checkpoints = stack.enter_context(checkpoint_writer(run_dir, config))
        try:
            run = Run(config, inputs, metrics, checkpoints, saved, initial)
        except SwitchMambaError:
            if new:  # what was refused has not begun: the same --out will do for what is asked next
                shutil.rmtree(run_dir)
            raise
        run_to_the_end(run, observers, stop)
        warn_of_guessing(config, run.last_loss)
        return TrainingResult(run.position.step, finished=run.position.step == config.training.steps)


def run_to_the_end(run: "Run", observers: Sequence[Observer], stop: StopRequest) -> None:
    """Take step after step until the last one or until asked to stop; save when it is due, and at the end."""
    training = run.config.training
    for observer in observers:
        observer.start(run.position.step, training.steps)

    def show(lines: Sequence[Line]) -> None:
        for line in lines:
            for observer in observers:
                observer.show(line)

    while run.next_step < training.steps and not stop.requested:
        show(run.step())
        if run.is_due(training.checkpoint_every):
            run.save()
    show(run.wait())
    run.save()
    if stop.requested and run.position.step < training.steps:
        logger.info("stopped as asked after step %d; --resume continues", run.position.step)


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return the device to train on; ConfigError if CUDA is asked for and missing."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device = 'cuda': this machine or this build of torch has none; use 'auto' or 'cpu'"
        )
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


def is_empty_directory(path: Path) -> bool:
    """Say whether ``path`` is a directory with nothing in it, where a run may begin."""
    return path.is_dir() and next(path.iterdir(), None) is None


def check_vocabulary(asked: int | None, entries: int) -> int:
    """Return the model's vocabulary for a tokenizer of ``entries``; ConfigError if the model's would be smaller."""
    if asked is None or asked == entries:
        return entries
    if asked < entries:
        raise ConfigError(
            f"model.vocab_size = {asked} is smaller than the {entries} entries of the data's tokenizer; "
            "leave it out, or raise it"
        )
    logger.info(
        "model.vocab_size = %d exceeds the %d entries of the data's tokenizer: the last %d are no tokens",
        asked,
        entries,
        asked - entries,
    )
    return asked


def warn_of_guessing(config: RunConfig, loss: float | None) -> None:
    """Warn of a last loss, in nats, well above that of guessing: it has blown up, and not come back."""
    guessing = math.log(config.model.vocab_size)
    if loss is not None and loss > guessing + 1:
        logger.warning(
            "the training loss is %.2f, above the %.2f of guessing among %d tokens: it has blown up; lower "
            "training.learning_rate",
            loss,
            guessing,
            config.model.vocab_size,
        )


def warn_of_warmup(config: RunConfig) -> None:
    """Warn if the run ends before its learning rate has come to the peak."""
    training = config.training
    if training.warmup_steps > training.steps:
        logger.warning(
            "training.warmup_steps = %d exceeds training.steps = %d: the learning rate never reaches its peak of %g",
            training.warmup_steps,
            training.steps,
            training.learning_rate,
        )


def report_cuts(inputs: Inputs) -> None:
    """Say how many conversations windows cut; warn if some are longer than any window."""
    cuts = inputs.train.cuts()
    if cuts is None or not cuts.cut:
        return
    remedy = f"; raise data.context_length, the longest has {cuts.longest:,} tokens"
    logger.log(
        logging.WARNING if cuts.always_cut else logging.INFO,
        "windows of data.context_length = %d cut %d of %d conversations in the first epoch, %d of them in every one: "
        "answers behind a cut are not learnt in that epoch, %.1f%% of all tokens stand there%s",
        inputs.train.context_length,
        cuts.cut,
        cuts.documents,
        cuts.always_cut,
        100 * cuts.lost,
        remedy if cuts.always_cut else "; a longer data.context_length cuts fewer",
    )


def warn_of_looking_ahead(model: LanguageModel) -> None:
    """Warn of a model whose loss knows what it is to predict, because a layer looks ahead."""
    if not model.causal:
        logger.warning(
            "the model is not causal (%s): its loss sees the tokens that it is to predict, and generate, chat and "
            "evaluate will refuse it without --allow-non-causal; for a language model choose a router such as top_k",
            model.why_not_causal,
        )


def start_afresh(run_dir: Path) -> None:
    """Say that a run to be resumed has no checkpoint; ConfigError if it had one, which was removed.

    A run that was killed before its first checkpoint begins again by itself.
    """
    steps = last_step(run_dir / "metrics.jsonl")
    if steps and _was_saved(run_dir, steps):
        raise ConfigError(
            f"{run_dir} holds metrics of {steps} steps but no checkpoint any more; restore {run_dir}/checkpoints, "
            f"choose another --out, or remove {run_dir}/metrics.jsonl to start from step 0"
        )
    lost = f"; its {steps} steps in metrics.jsonl are taken again" if steps else ""
    logger.log(
        logging.WARNING if steps else logging.INFO,
        "no checkpoint in %s: starting from step 0%s",
        run_dir,
        lost,
    )


def _was_saved(run_dir: Path, steps: int) -> bool:
    """Say whether a checkpoint of the run must have been published by the time it had logged ``steps``."""
    try:
        training = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["training"]
        # A checkpoint in the making does not hold up the next steps, but the next checkpoint waits for it.
        every = training["checkpoint_every"] * (2 if training["asynchronous_checkpoints"] else 1)
        never_stood = any(
            (run_dir / "checkpoints").glob("*.tmp-*")
        )  # killed while saving, or the disk was full
        return 0 < every < steps or (steps >= training["steps"] and not never_stood)
    except (OSError, ValueError, KeyError, TypeError):
        return True  # config.json comes before the first line of metrics: somebody has removed files


def queues_steps(device: str) -> bool:
    """Say whether the host runs ahead of ``device``; a CPU is the host."""
    return device != "cpu"


def check_resumable(saved: Saved, config: RunConfig, inputs: Inputs) -> None:
    """Refuse to continue ``saved`` with other data or a configuration that differs where it may not."""
    check_data(saved, inputs.fingerprint)
    different = differences(saved.config, config.model_dump(mode="json"))
    if different:
        raise ConfigError(
            f"{saved.path}: was trained with another configuration: {', '.join(different)}; start a new --out"
        )


@dataclass(frozen=True)
class _Queued:
    """A step on its way; ``start``: when the host began with it."""

    step: LaunchedStep
    learning_rate: float
    tokens: int
    start: float


class Run:
    """A run in progress: model, optimizer and position, which metrics and checkpoints record."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        metrics: MetricsLog,
        checkpoints: CheckpointWriter,
        saved: Saved | None,
        initial: Path | None,
    ) -> None:
        """Continue ``saved``, or begin with the weights in ``initial`` or with those that the seed gives."""
        self.config = config
        self._inputs = inputs
        self._metrics = metrics
        self._checkpoints = checkpoints
        device = torch.device(config.training.device)
        seed_generators(config.training.seed)
        self._model = LanguageModel(config.model).to(device)
        warn_of_looking_ahead(self._model)
        if saved is not None:
            restore_weights(saved, self._model, config.training.lora)
        elif initial is not None:
            copy_weights(self._model, initial / WEIGHTS)
            logger.info("starting from the weights of %s", initial)
            if config.training.lora is not None:
                add_lora(self._model, config.training.lora)
        begun_with = initial if saved is None else saved.path
        self._chat_template = inputs.chat_template
        if self._chat_template is None and begun_with is not None:
            self._chat_template = read_chat_template(begun_with)
        freeze(self._model, config.training.freeze)
        self._optimizer = build_optimizer(self._model, config.training)
        self.position = Position(0, SmoothedLoss(config.training.loss_ema_alpha))
        if saved is not None:
            self.position = restore(saved, self._model, self._optimizer)
            set_aside_newer(saved)
        self.last_loss: float | None = None  # of the last step here that had a target
        self._graph: StepGraph | None = None
        if config.training.cuda_graph and device.type == "cuda" and not changes_with_steps(config.training):
            self._graph = StepGraph(self._model, self._optimizer, config.training)
        self._queued: deque[_Queued] = deque()
        self._last_end = 0.0
        self._saved_step = None if saved is None else self.position.step
        metrics.truncate(after_step=self.position.step)
        if config.training.compile:
            for residual_step in self._model.steps():
                residual_step.compile()
        self._flops_per_token = account(config.model).training_flops_per_token(config.data.context_length)
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self._peak = peak_flops(device, dtype)

    def is_due(self, every: int) -> bool:
        """Say whether something that happens every ``every`` steps (0: never) happens after the last one."""
        return _is_due(self.position.step, every)

    @property
    def next_step(self) -> int:
        """How many steps are done or on their way."""
        return self.position.step + len(self._queued)

    def step(self) -> list[Line]:
        """Take one step, validate if it is due, and return the lines of metrics that are complete, and written.

        On a GPU the step is only queued, and the line is that of the step before: the device has work while the host
        prepares more. But nothing is left in the queue when something else is due.
        """
        step = self.next_step
        training = at_step(self.config.training, self.position.balance_factor)
        set_capacity(self._model, training, step)
        start = perf_counter()
        rate = learning_rate(step, training)
        batch = self._inputs.batch(step, self.config)
        tokens = batch.tokens_BL.numel()
        if not queues_steps(training.device):
            result = train_step(self._model, self._optimizer, batch, training, rate)
            return [self._finish(result, rate, tokens / (perf_counter() - start))]
        if self._graph is None:
            launched = launch_step(self._model, self._optimizer, batch, training, rate)
        else:
            launched = self._graph.launch(batch, rate)
        self._queued.append(_Queued(launched, rate, tokens, start))
        due = step + 1 == training.steps or any(
            _is_due(step + 1, every) for every in (training.validate_every, training.checkpoint_every)
        )
        return self.wait(leave=0 if due else 1)

    def wait(self, leave: int = 0) -> list[Line]:
        """Finish the queued steps but the last ``leave`` ones."""
        lines = []
        while len(self._queued) > leave:
            queued = self._queued.popleft()
            result = queued.step.result()
            end = perf_counter()
            seconds = end - max(queued.start, self._last_end)
            self._last_end = end
            lines.append(self._finish(result, queued.learning_rate, queued.tokens / seconds))
        return lines

    def _finish(self, result: StepResult, rate: float, tokens_per_second: float) -> Line:
        training = self.config.training
        factor = next_factor(self.position.balance_factor, result.router_stats, training)
        self.position = self.position.after(result.loss, factor)
        if result.loss is not None:
            self.last_loss = result.loss
        line = self._line(result, rate, tokens_per_second)
        is_last = self.position.step == training.steps
        if self._inputs.validation is not None and (is_last or self.is_due(training.validate_every)):
            line["validation_loss"] = validate(
                self._model, self._inputs.validation_batches(self.config), training
            )
        self._metrics.write(line)
        return line

    def _line(self, result: StepResult, rate: float, tokens_per_second: float) -> dict[str, Any]:
        tokens_per_step = self.config.training.batch_size * self.config.data.context_length
        adapts = self.config.training.load_balance_target is not None
        return {
            "step": self.position.step,
            "tokens": self.position.step * tokens_per_step,
            "loss": result.loss,
            "loss_ema": self.position.smoothed.value,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu(tokens_per_second, self._flops_per_token, self._peak),
            "peak_memory": peak_memory(self._model.device),
            **router_metrics(result.router_stats),
            **({"balance_factor": self.position.balance_factor} if adapts else {}),
        }

    def save(self) -> None:
        """Publish a checkpoint of this step, unless it stands already; the metrics come first."""
        if self._saved_step == self.position.step:
            return
        self._metrics.sync()
        next_sample = self.position.step * self.config.training.batch_size
        is_last = self.position.step == self.config.training.steps
        sampler = {"seed": self.config.training.seed, "next_sample": next_sample}
        self._checkpoints.save(
            self._model,
            None if is_last and not self.config.training.save_optimizer else self._optimizer,
            self.position,
            self._inputs.tokenizer,
            self.config.model_dump(mode="json"),
            {"sampler": sampler, "data": self._inputs.fingerprint},
            self._chat_template,
        )
        self._saved_step = self.position.step


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def checkpoint_writer(run_dir: Path, config: RunConfig) -> CheckpointWriter:
    """Return the writer of the run's checkpoints."""
    training = config.training
    return CheckpointWriter(
        run_dir / "checkpoints", training.keep_checkpoints, training.asynchronous_checkpoints
    )


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write ``config.json``, whole or not at all."""
    path, partial = run_dir / "config.json", run_dir / "config.json.tmp"
    try:
        partial.write_text(json.dumps(config.model_dump(mode="json"), indent=2), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SwitchMambaError(
            f"{path}: cannot be written ({error.strerror}); free space and --resume"
        ) from error
