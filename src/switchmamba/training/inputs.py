"""What a run reads: the prepared data, its tokenizer, and which samples belong to which step."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from switchmamba.data.sampler import Batch, Sampler, every_target_once
from switchmamba.data.shards import TokenShards
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import DataError
from switchmamba.training.config import RunConfig

VALIDATION_SEED = 0
"""Of the order in which held-out windows are taken: the same ones for every run, whatever its own seed."""


@dataclass(frozen=True)
class Inputs:
    """Data of a run.

    Attributes:
        tokenizer: what the data was made with; every checkpoint holds a copy.
        train_shards: the training split.
        train: samples s·G to (s+1)·G are the batch of step s, for a batch size of G.
        validation: held-out documents; None when validation is switched off.
        chat_template: of conversations, the template that made them; every checkpoint holds a copy.
        fingerprint: sha256 of the tokenizer and of the training split's files, by which a resumed run
            knows them.
    """

    tokenizer: Tokenizer
    train: Sampler
    train_shards: TokenShards
    validation: TokenShards | None
    chat_template: str | None
    fingerprint: dict[str, Any]

    @classmethod
    def open(cls, data_dir: Path, config: RunConfig) -> "Inputs":
        """Open a directory that ``data prepare`` wrote; DataError says what is missing or wrong with it."""
        shards = TokenShards.open(data_dir, "train")
        tokenizer = Tokenizer.from_file(shards.tokenizer_path)
        if tokenizer.sha256 != shards.tokenizer_sha256:
            raise DataError(
                f"{shards.tokenizer_path}: is not the tokenizer that made the shards; prepare the data again"
            )
        if config.training.validate_every and "validation" not in shards.index.splits:
            raise DataError(
                f"{data_dir}: holds no validation split; prepare the data with one, or set training.validate_every to 0"
            )
        validation = TokenShards.open(data_dir, "validation") if config.training.validate_every else None
        return cls(
            tokenizer,
            Sampler(
                shards,
                config.data.context_length,
                config.training.seed,
                reset_state=config.data.reset_state,
                from_beginning=shards.index.chat_template_sha256 is not None,
                name=f"{data_dir}: the training split",
            ),
            shards,
            validation,
            shards.chat_template(),
            {"tokenizer_sha256": tokenizer.sha256, "train_sha256": shards.sha256},
        )

    def verify(self) -> None:
        """Read all shards and check them against their index; about a second per GB."""
        for shards in filter(None, (self.train_shards, self.validation)):
            shards.verify()

    def batch(self, step: int, config: RunConfig) -> Batch:
        """Return the batch of the update after ``step`` completed ones."""
        size = config.training.batch_size
        return self.train.batch(step * size, size)

    def validation_batches(self, config: RunConfig) -> Iterable[Batch]:
        """Return the held-out batches, the same every time; of a small split every target once."""
        assert self.validation is not None
        length, size = config.data.context_length, config.training.batch_size
        count, reset_state = config.training.validation_batches, config.data.reset_state
        from_beginning = self.chat_template is not None
        if self.validation.num_tokens - 1 <= count * size * length:
            return islice(
                every_target_once(
                    self.validation, length, size, reset_state=reset_state, from_beginning=from_beginning
                ),
                count + 1,
            )
        sampler = Sampler(
            self.validation, length, VALIDATION_SEED, reset_state=reset_state, from_beginning=from_beginning
        )
        return (sampler.batch(i * size, size) for i in range(count))
