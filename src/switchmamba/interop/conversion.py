"""Export and import: load, convert, compare logits, write whole or not at all."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from switchmamba.checkpoint import new_directory, newest_valid, read_json, saved_step
from switchmamba.config import Tables
from switchmamba.data.chat import CHAT_TEMPLATE
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop import format_named, guess_format
from switchmamba.interop.model_card import CardFacts, model_card
from switchmamba.interop.verification import Agreement, Foreign, verify
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import CONFIG, load_verified, read_chat_template, refuse_quantized, save_model

README = "README.md"


@dataclass(frozen=True)
class Native:
    """What is exported: a model in ``eval()`` mode on the CPU, its tokenizer, and where they come from.

    Attributes:
        path: the checkpoint. ``step``: of its training run; None: it was not saved by ``train``.
        tables: its config.json.
        options: what the user asked of the format, by name (``file_type``).
        seed: of the tokens that models are compared on.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    path: Path
    step: int | None
    tables: Tables
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What ``export`` of a format wrote into its directory.

    Attributes:
        foreign: the model as other programs read it from the files.
        tolerance: relative difference of logits that rounding explains.
        usage: Markdown that says how to load it.
        reference: the model that ``foreign`` must equal, if the format rounds weights; None: the exported one.
        deviations: sentences on what is not as in the native model.
        front_matter: more lines of the card's YAML (``library_name``).
    """

    foreign: Foreign
    tolerance: float
    usage: str
    reference: LanguageModel | None = None
    deviations: tuple[str, ...] = ()
    front_matter: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What is imported: a directory, its config.json, and the tokenizer.json that the user named, if any."""

    path: Path
    config: Tables
    tokenizer_file: Path | None

    def tokenizer(self, hint: str = "") -> Tokenizer:
        """Read the tokenizer: the one the user named, or the directory's."""
        file = self.tokenizer_file or self.path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file{hint}; --tokenizer names the tokenizer.json of this model"
            )
        return Tokenizer.from_file(file)


@dataclass(frozen=True)
class Read:
    """What ``import_`` of a format read: the native model, its tokenizer, and the foreign one to compare with."""

    model: LanguageModel
    tokenizer: Tokenizer
    foreign: Foreign
    tolerance: float


@dataclass(frozen=True)
class Exported:
    """What an export reports."""

    path: Path
    agreement: Agreement
    deviations: tuple[str, ...]


def export_checkpoint(
    checkpoint: Path, to: str, out: Path, options: Mapping[str, str] | None = None, seed: int = 0
) -> Exported:
    """Write a checkpoint in another format as the new directory ``out``, with a model card.

    Args:
        checkpoint: a run or a checkpoint.
        to: the format.
        out: must not exist.
        options: of the format, by name: ``file_type`` of gguf.
        seed: of the tokens that the logits are compared on.

    Raises:
        ConfigError: no such format, or the model cannot be expressed in it, for every reason that it names.
        CheckpointError: no usable checkpoint, ``out`` exists, or the logits differ; nothing is left behind.
    """
    export = format_named(to, importing=False).function("export")
    directory = newest_valid(checkpoint)
    model, tokenizer = load_verified(directory)
    refuse_quantized(model, directory)
    tables = read_json(directory / CONFIG)
    native = Native(model, tokenizer, directory, saved_step(directory), tables, dict(options or {}), seed)
    with new_directory(out) as partial:
        written: Written = export(native, partial)
        template = read_chat_template(directory)
        # Beside a tokenizer_config.json AutoTokenizer reads it.
        if template is not None and (partial / "tokenizer_config.json").is_file():
            (partial / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        reference = written.reference or model
        agreement = verify(reference, written.foreign, written.tolerance, f"the {to} export", seed)
        facts = CardFacts.collect(directory, native.step, tables, model.config, tokenizer)
        card = model_card(
            facts, out.name, to, agreement, written.usage, written.deviations, written.front_matter
        )
        (partial / README).write_text(card, encoding="utf-8")
        mode = stat.S_IMODE((partial / README).stat().st_mode)
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors makes files private
    return Exported(out, agreement, written.deviations)


def import_checkpoint(
    path: Path, out: Path, from_: str | None = None, tokenizer: Path | None = None, seed: int = 0
) -> Agreement:
    """Write another program's model as the new native checkpoint ``out``, which can be trained on and exported.

    Args:
        path: a directory with config.json and weights.
        out: must not exist.
        from_: the format; None: guessed from config.json.
        tokenizer: a tokenizer.json; None: the directory's.
        seed: of the tokens that the logits are compared on.

    Raises:
        ConfigError: an unknown format, or a model that cannot be expressed here, for every reason that it names.
        CheckpointError: files that cannot be used, or logits that differ; nothing is left behind.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: {'is a file' if path.exists() else 'no such directory'}; name a directory"
        )
    config = read_json(path / CONFIG)
    name = from_ or guess_format(config)
    read: Read = format_named(name, importing=True).function("import_")(Source(path, config, tokenizer))
    entries, capacity = read.tokenizer.vocab_size, read.model.config.vocab_size
    if entries > capacity:
        raise ConfigError(f"the tokenizer has {entries} entries, the model {capacity}; name the model's own")
    agreement = verify(read.model, read.foreign, read.tolerance, str(path), seed)
    origin = {"imported_from": {"path": str(path), "format": name, "difference": agreement.relative}}
    save_model(out, read.model, read.tokenizer, origin, read_chat_template(path))
    return agreement
