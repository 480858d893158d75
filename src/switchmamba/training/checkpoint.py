"""Training checkpoints: all that continues a run bit for bit, in a verified directory ``step-N``.

    config.json            the resolved configuration
    tokenizer.json         what the data was made with
    model.safetensors      weights; with LoRA those of base and adapter together
    chat_template.jinja    of a model that was trained on conversations
    adapter_model.safetensors, adapter_config.json     the adapter by itself, as peft reads it (LoRA)
    base.safetensors       the weights under the adapter (LoRA); like the optimizer's state to continue from
    optimizer.safetensors  AdamW's moments and step counts, by parameter name; the last checkpoint of a run may lack it
    training.json          steps taken, next sample, smoothed loss, balance factor, random generators, what identifies
                           the data

The learning rate, the samples and a capacity schedule are functions of the step; nothing else is remembered.
"""

import base64
import json
import logging
import random
import secrets
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW

from switchmamba.checkpoint import (
    Content,
    newest_valid,
    partial_path,
    read_json,
    read_tensors,
    remove_directory,
    remove_partial_directories,
    step_directories,
    step_number,
    write_directory,
)
from switchmamba.config import Tables
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, ConfigError, DataError, NonFiniteError, SwitchMambaError
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    copy_weights,
    model_files,
    read_model_config,
)
from switchmamba.models.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    LoraSettings,
    adapter_config,
    adapter_tensors,
    add_lora,
    base_tensors,
    has_lora,
    load_adapter,
    merged_tensors,
)
from switchmamba.training.config import differences
from switchmamba.training.metrics import SmoothedLoss
from switchmamba.training.optimizer import load_state_tensors, state_tensors
from switchmamba.training.parts import part_names

logger = logging.getLogger("switchmamba")

OPTIMIZER, TRAINING, BASE = "optimizer.safetensors", "training.json", "base.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps taken, and after them the smoothed loss and the factor on the balance losses."""

    step: int
    smoothed: SmoothedLoss
    balance_factor: float = 1.0

    def after(self, loss: float | None, balance_factor: float = 1.0) -> Self:
        """Return the position after one more step with this loss, and this factor for the next one."""
        return replace(
            self, step=self.step + 1, smoothed=self.smoothed.update(loss), balance_factor=balance_factor
        )


# Saving


class CheckpointWriter:
    """Writes and prunes ``step-N`` directories, at once or from a copy in a thread.

    A failed write is raised by :meth:`save` itself, or in asynchronous mode by the next call or the end
    of the block.
    """

    def __init__(self, directory: Path, keep: int, asynchronous: bool) -> None:
        self.directory = directory
        self.keep = keep
        self._executor = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(
        self,
        model: LanguageModel,
        optimizer: AdamW | None,
        position: Position,
        tokenizer: Tokenizer,
        config: Tables,
        training: Tables,
        chat_template: str | None = None,
    ) -> None:
        """Save step ``position.step``; ``training`` are further fields of training.json, ``data`` among them.

        Without ``optimizer`` training cannot go on from it.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
        """
        self.wait()  # two copies at a time would cost memory
        _refuse_poison(model)
        copy = self._executor is not None
        record = {
            "step": position.step,
            "smoothed_loss": asdict(position.smoothed),
            "balance_factor": position.balance_factor,
            "rng": rng_state(),
            **training,
        }
        files = model_files(model, tokenizer, config, chat_template) | {
            WEIGHTS: _tensor_file(merged_tensors(model), copy),
            TRAINING: json.dumps(record).encode(),
        }
        if has_lora(model):
            files |= {
                ADAPTER: _tensor_file(adapter_tensors(model), copy),
                ADAPTER_CONFIG: adapter_config(model),
            }
        if optimizer is not None:
            files[OPTIMIZER] = _tensor_file(state_tensors(optimizer, model), copy)
            if has_lora(model):
                files[BASE] = _tensor_file(base_tensors(model), copy)
        extra = {"step": position.step, "world_size": 1, "data": training["data"]}
        if self._executor is None:
            self._write(position.step, files, extra)
        else:
            self._pending = self._executor.submit(self._write, position.step, files, extra)

    def wait(self) -> None:
        """Return when nothing is being written; raise what a write in the thread raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, files: Mapping[str, Content], extra: Tables) -> None:
        if self.directory.is_dir():
            remove_partial_directories(self.directory)
        path = self.directory / f"step-{step}"
        try:
            write_directory(path, files, extra)
        except SwitchMambaError:
            if not step_directories(self.directory):
                with suppress(OSError):  # for --resume: the only checkpoint was not removed, it never stood
                    partial_path(path).mkdir()
            raise
        for old in step_directories(self.directory)[: -self.keep]:
            remove_directory(old)
        logger.info("saved %s", path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if kind is None:
            self.wait()


def _tensor_file(tensors: Mapping[str, Tensor], copy: bool) -> Content:
    held = {name: tensor.detach().to("cpu", copy=copy).contiguous() for name, tensor in tensors.items()}
    return lambda path: save_file(held, path)


def _refuse_poison(model: LanguageModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"parameter {name} holds NaN or infinity; not saved: continue from the last checkpoint"
            )


# Resuming


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint, of which only the JSON is read so far."""

    path: Path
    config: Tables
    training: Tables

    @property
    def position(self) -> Position:
        """Where the run stood."""
        return Position(
            self.training["step"],
            SmoothedLoss(**self.training["smoothed_loss"]),
            self.training["balance_factor"],
        )


def find_checkpoint(run_dir: Path) -> Saved | None:
    """Return the newest valid checkpoint of a run; None if it has none yet.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged, or it was not written by ``train``.
    """
    directory = run_dir / "checkpoints"
    if not step_directories(directory):
        return None
    path = newest_valid(directory)
    saved = Saved(path, read_json(path / CONFIG), read_json(path / TRAINING))
    try:
        fits = saved.position.step == step_number(path) and {"data", "rng"} <= saved.training.keys()
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{path / TRAINING}: does not describe {path.name}; it was renamed or is not a training run's"
        )
    return saved


def set_aside_newer(saved: Saved) -> None:
    """Rename damaged checkpoints newer than ``saved``, so that their steps can be saved again."""
    for path in step_directories(saved.path.parent):
        if step_number(path) > step_number(saved.path):
            aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
            logger.warning("%s is damaged; renamed to %s, which may be deleted", path, aside.name)
            path.rename(aside)


def find_initial(path: Path, model: ModelConfig, tokenizer: Tokenizer) -> Path:
    """Return the newest valid checkpoint in ``path``, if it is of this model and tokenizer.

    Raises:
        ConfigError: the model's configuration differs; names the fields.
        DataError: the tokenizer does.
        CheckpointError: no checkpoint there that can be used.
    """
    path = newest_valid(path)
    if Tokenizer.from_file(path / TOKENIZER).sha256 != tokenizer.sha256:
        raise DataError(
            f"{path}: was trained with another tokenizer than --data holds; prepare the text with "
            f"--tokenizer {path / TOKENIZER}"
        )
    stored = {"model": read_model_config(path).model_dump(mode="json")}
    different = differences(stored, {"model": model.model_dump(mode="json")})
    if different:
        raise ConfigError(
            f"{path}: cannot start another model than it holds: {', '.join(different)}; configure what it holds"
        )
    return path


def check_data(saved: Saved, fingerprint: Tables) -> None:
    """Refuse data other than what the checkpoint was trained on."""
    for name, value in fingerprint.items():
        if saved.training["data"].get(name) != value:
            what = "training text" if name == "train_sha256" else name.removesuffix("_sha256")
            raise DataError(
                f"{saved.path}: was trained with another {what} than --data holds; name the same data"
            )


def require_optimizer(saved: Saved) -> None:
    """Refuse to train on from a checkpoint that was saved without the optimizer's state."""
    if saved.position.step and not (saved.path / OPTIMIZER).is_file():
        raise ConfigError(
            f"{saved.path}: training cannot go on from it, it was saved without the optimizer's state "
            "(training.save_optimizer = false); --from begins a new run with its weights"
        )


def restore_weights(saved: Saved, model: LanguageModel, lora: LoraSettings | None) -> None:
    """Fill ``model``, as it was built, from ``saved``; with ``lora`` it gets the adapter, too."""
    if lora is None:
        copy_weights(model, saved.path / WEIGHTS)
    else:
        copy_weights(model, saved.path / BASE)
        add_lora(model, lora)
        load_adapter(model, saved.path)


def restore(saved: Saved, model: LanguageModel, optimizer: AdamW) -> Position:
    """Fill optimizer and random generators from ``saved``; return where the run stood."""
    if saved.position.step:
        tensors = read_tensors(saved.path / OPTIMIZER)
        frozen = part_names(model, saved.config["training"]["freeze"])
        load_state_tensors(optimizer, model, tensors, str(saved.path / OPTIMIZER), frozen)
    restore_rng_state(saved.training["rng"])
    return saved.position


def seed_generators(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def rng_state() -> Tables:
    """Return the state of every global random generator as JSON values."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_rng_state(state: Tables) -> None:
    """Put :func:`rng_state` back; CUDA's only where the number of devices is the same."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(text) for text in state["cuda"]])


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
