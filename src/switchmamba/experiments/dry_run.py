"""Building an experiment's models without memory or time, to see that they can be built and how large they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from switchmamba.errors import ConfigError
from switchmamba.experiments.runner import resolve_run
from switchmamba.experiments.spec import Experiment, Run
from switchmamba.models.accounting import Account, account
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """A run of the search, its configuration, and what its model costs."""

    run: Run
    config: RunConfig
    account: Account


def build_runs(experiment: Experiment, arms: Sequence[str] | None = None) -> Iterator[PlannedRun]:
    """Build the model of every run of the search on the meta device; its size must be what the configuration says.

    With ``arms`` of these arms alone.
    """
    for arm in [arm for arm in experiment.arms if arms is None or arm in arms]:
        for run in experiment.candidates(arm):
            config = resolve_run(run)
            counts = account(config.model)
            with torch.device("meta"):
                built = sum(parameter.numel() for parameter in LanguageModel(config.model).parameters())
            if built != counts.parameters_with_embeddings:
                raise ConfigError(
                    f"run {run.name}: the model has {built:,} parameters, its configuration counts "
                    f"{counts.parameters_with_embeddings:,}; one of the two is wrong"
                )
            yield PlannedRun(run, config, counts)
