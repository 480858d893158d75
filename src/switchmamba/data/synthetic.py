"""Generated tasks that measure memory: selective copying and induction heads (Mamba, arXiv 2312.00752, §4.1).

    selective-copying   . . c . . a . . . b . > c a b        data tokens among noise; behind ">" they come in order
    induction-heads     h d # c f a b d g e # c              behind the second "#" comes what stood behind the first

One example is one document, closed by the end of text. Only the answer's tokens count as targets (its mask), so that
a loss or an accuracy on such data is that of the answers. A token is one character, so examples can be read, and typed
as prompts; the tokenizer is byte-level, without merges, the same for every task.

A new task is a class here and a member of :data:`TASKS`. Example i of a split depends on task, seed and i alone.
"""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from switchmamba.config import Config, validate
from switchmamba.data.defaults import SHARD_TOKENS
from switchmamba.data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    Index,
    SplitRecord,
    SyntheticRecord,
    encode_index,
    token_dtype,
)
from switchmamba.data.sampler import permutation, random_bits
from switchmamba.data.shard_writer import SplitWriter, new_directory, require_new, write_file
from switchmamba.data.split import SPLITS, Split
from switchmamba.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from switchmamba.errors import ConfigError

ORDINARY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""Characters of the tokens that carry something to be remembered."""

NOISE, BEGIN, SPECIAL = ".", ">", "#"

_BATCH = 4096  # examples that are encoded at once
_PLACES, _VALUES = 0, 1  # what is drawn for an example


class Example(NamedTuple):
    """One document without its end of text, and the part at its end that is the answer."""

    text: str
    answer: str


class Task(Config):
    """What a task has: a length, a vocabulary, and its n-th example.

    Attributes:
        length: tokens before the answer that may matter; a task may add a marker.
        vocabulary: tokens in use, special ones included.
    """

    name: ClassVar[str]

    length: int
    vocabulary: int = Field(default=16, ge=3, le=len(ORDINARY))

    @property
    @abstractmethod
    def answer_tokens(self) -> int:
        """How many tokens an answer has."""

    @abstractmethod
    def example(self, *key: int) -> Example:
        """Return the example that ``key`` draws."""


class SelectiveCopying(Task):
    """Write the ``data_tokens`` that stand at random places among noise, in their order.

    The noise and the marker that begins the answer are two tokens of the vocabulary. The paper: 4,096 tokens, 16 of
    data, a vocabulary of 16.
    """

    name = "selective-copying"

    length: int = Field(default=256, ge=1)
    data_tokens: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _data_fits(self) -> "SelectiveCopying":
        if self.data_tokens > self.length:
            raise ValueError(f"{self.data_tokens} data tokens do not fit into a length of {self.length}")
        return self

    @property
    def answer_tokens(self) -> int:
        """The data tokens."""
        return self.data_tokens

    def example(self, *key: int) -> Example:
        """Every set of places and every row of data tokens is equally likely."""
        places = np.sort(permutation(self.length, *key, _PLACES)[: self.data_tokens])
        values = random_bits(self.data_tokens, *key, _VALUES) % (self.vocabulary - 2)
        sequence = [NOISE] * self.length
        data = [ORDINARY[value] for value in values.tolist()]
        for place, symbol in zip(places.tolist(), data, strict=True):
            sequence[place] = symbol
        answer = "".join(data)
        return Example("".join(sequence) + BEGIN + answer, answer)


class InductionHeads(Task):
    """Say what followed the special token, when it comes for the second time, as the last of ``length`` tokens.

    The special token is one of the vocabulary; the others are drawn at random. The paper: 256 tokens, a vocabulary of
    16, and tests at 64 to 1,048,576 tokens.
    """

    name = "induction-heads"

    length: int = Field(default=256, ge=3)

    @property
    def answer_tokens(self) -> int:
        """One."""
        return 1

    def example(self, *key: int) -> Example:
        """Every place of the first special token that leaves room for the token behind it is equally likely."""
        values = random_bits(self.length, *key, _VALUES) % (self.vocabulary - 1)
        sequence = [ORDINARY[value] for value in values.tolist()]
        place = int(random_bits(1, *key, _PLACES)[0]) % (self.length - 2)
        sequence[place] = sequence[-1] = SPECIAL
        answer = sequence[place + 1]
        return Example("".join(sequence) + answer, answer)


TASKS: dict[str, type[Task]] = {task.name: task for task in (SelectiveCopying, InductionHeads)}


def prepare_synthetic(
    task: Task,
    out: str | Path,
    *,
    train_examples: int = 20_000,
    validation_examples: int = 1_000,
    validation_length: int | None = None,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> Index:
    """Write examples of ``task`` to ``out`` as token shards with masks, in the format of ``data prepare``.

    Args:
        task: what to generate.
        out: a directory that does not exist or is empty; it appears whole or not at all.
        train_examples: 0 for a directory to evaluate on only.
        validation_examples: 0 for none.
        validation_length: of the validation split, to see whether a model generalises; None: the task's.
        seed: 0 ≤ seed < 2^63.
        shard_tokens: a shard closes before it would exceed this.

    Raises:
        ConfigError: an argument is impossible, or ``out`` exists.
        SwitchMambaError: writing failed, such as for lack of space.
    """
    out = Path(out)
    require_new(out)
    if min(train_examples, validation_examples) < 0 or train_examples + validation_examples == 0:
        raise ConfigError(
            f"{train_examples} training and {validation_examples} validation examples; ask for some, and none below 0"
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is outside 0 … 2^63-1")
    counts: dict[Split, int] = {"train": train_examples, "validation": validation_examples}
    tasks: dict[Split, Task] = {"train": task, "validation": with_length(task, validation_length)}
    tokenizer = Tokenizer.train([], MIN_VOCAB_SIZE)
    with new_directory(out) as directory:
        splits: dict[Split, SplitRecord] = {}
        dtype, end_of_text = np.dtype(token_dtype(tokenizer.vocab_size)), tokenizer.end_of_text_id
        for number, split in enumerate(SPLITS):
            if counts[split]:
                with SplitWriter(directory, split, dtype, end_of_text, shard_tokens, masked=True) as writer:
                    splits[split] = _write(writer, tasks[split], counts[split], (seed, number), tokenizer)
        index = Index(
            dtype=token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            tokenizer_sha256=tokenizer.sha256,
            splits=splits,
            source=SyntheticRecord(
                task=task.name,
                vocabulary=task.vocabulary,
                length={split: tasks[split].length for split in splits},
                answer_tokens=task.answer_tokens,
                seed=seed,
            ),
        )
        tokenizer.save(directory / TOKENIZER_FILE)
        write_file(directory / INDEX_FILE, encode_index(index))
    return index


def with_length(task: Task, length: int | None) -> Task:
    """Return the task with another length; None changes nothing. ConfigError if it is too short."""
    if length is None:
        return task
    return validate(type(task), {**task.model_dump(), "length": length}, f"{task.name}, validation")


def _write(
    writer: SplitWriter, task: Task, count: int, key: tuple[int, int], tokenizer: Tokenizer
) -> SplitRecord:
    for first in range(0, count, _BATCH):
        examples = [task.example(*key, i) for i in range(first, min(first + _BATCH, count))]
        encoded = tokenizer.encode_batch([example.text for example in examples])
        for example, ids in zip(examples, encoded, strict=True):
            counted = np.zeros(len(ids) + 1, np.bool_)
            counted[len(ids) - len(example.answer) : len(ids)] = True
            writer.add(ids, len(example.text), counted)
    return writer.finish()
