"""What a model is: named layers, the pattern in which they follow each other, and how often the pattern repeats.

    [model]
    d_model = 512
    num_blocks = 8
    pattern = ["mamba", "moe"]          # one residual step each: x + mamba(norm(x)), then x + moe(norm(x))
    [model.layers.mamba]
    kind = "mamba"
    [model.layers.moe]
    kind = "moe"
    num_experts = 42

An entry of the pattern that is itself a list runs its layers side by side behind one norm: x + a(norm(x)) + b(norm(x)),
or each behind its own.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from switchmamba.config import Config, nearest
from switchmamba.layers import AnyLayerConfig


class ModelConfig(Config):
    """Configuration of a :class:`~switchmamba.models.language_model.LanguageModel`.

    Attributes:
        vocab_size: V; ``train`` takes it from the data.
        d_model: width D of the residual stream.
        num_blocks: how often ``pattern`` repeats.
        pattern: names from ``layers``, one residual step each; a list of names is one step with parallel branches.
        layers: the layers by name.
        norm: before every step. ``final_norm``: one more before the head.
        norm_per_branch: of a step with parallel branches, each has a norm of its own; False: they share one.
        tie_embeddings: the head shares the embedding's weight.
        initialization: "paper" or "modern" (the table in ``layers/initialization.py``).
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    num_blocks: PositiveInt
    pattern: list[str | list[str]]
    layers: dict[str, AnyLayerConfig]
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    norm_per_branch: bool = False
    final_norm: bool = True
    tie_embeddings: bool = False
    initialization: Literal["paper", "modern"] = "modern"

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_of_names(cls, pattern: Any) -> Any:
        # Before the types are checked: of a union pydantic would report every member's complaint.
        steps = list(pattern) if isinstance(pattern, (list, tuple)) else [None]
        steps = [list(step) if isinstance(step, tuple) else step for step in steps]
        names = [[step] if isinstance(step, str) else step for step in steps]
        if not all(isinstance(step, list) and all(isinstance(name, str) for name in step) for step in names):
            raise ValueError(
                "must be a list of layers' names, or of lists of them: ['mamba', 'moe'] or [['mamba', 'moe']]"
            )
        return steps

    @model_validator(mode="after")
    def _pattern_names_layers(self) -> "ModelConfig":
        for step in self.steps[: len(self.pattern)]:
            if not step:
                raise ValueError("pattern has an empty list; name at least one layer in it")
            for name in step:
                if name not in self.layers:
                    raise ValueError(
                        f"pattern names layer {name!r}, which is not in layers{nearest(name, list(self.layers))}"
                    )
            if len(set(step)) < len(step):
                raise ValueError(
                    f"pattern runs a layer twice beside itself: {step}; give the second one a name of its own"
                )
        if not self.pattern:
            raise ValueError("pattern is empty; name at least one layer")
        unused = set(self.layers) - {name for step in self.steps for name in step}
        if unused:
            raise ValueError(f"layers {sorted(unused)} are not in pattern; remove them or name them there")
        for name in {"norm", "norms"} & set(self.layers):
            raise ValueError(f'a layer may not be named "{name}": that is where a step keeps its own')
        if self.norm_per_branch and all(len(step) == 1 for step in self.steps):
            raise ValueError(
                "norm_per_branch = true, but no step of the pattern has several branches; leave it out, or write them "
                "as a list in the pattern: [['mamba', 'moe']]"
            )
        for config in self.layers.values():
            config.check(self.d_model)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, and the one that peft looks for by another name."""
        return self.model_dump(mode="json") | {"tie_word_embeddings": self.tie_embeddings}

    @property
    def steps(self) -> list[list[str]]:
        """All residual steps in order, each as the names of its branches."""
        return [
            [entry] if isinstance(entry, str) else list(entry) for entry in self.pattern
        ] * self.num_blocks

    @property
    def written_pattern(self) -> str:
        """The pattern in one line: ``mamba → moe``, ``mamba + moe`` side by side."""
        return " → ".join(entry if isinstance(entry, str) else " + ".join(entry) for entry in self.pattern)

    def norms_of(self, step: Sequence[str]) -> int:
        """Return how many norms a step with these branches has."""
        return len(step) if self.norm_per_branch else 1

    @property
    def num_norms(self) -> int:
        """How many norms the model has."""
        return sum(map(self.norms_of, self.steps)) + self.final_norm
