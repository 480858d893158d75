"""Sparse upcycling: a trained model becomes a sparse one (Komatsuzaki et al. 2022, arXiv 2212.05055, §3).

    source         target
    any layer   →  the same layer, copied
    mlp         →  moe: every expert a copy of it (W2 / w̄), the router fresh
    mlp         →  moe with shared experts: the shared ones are it, the others fresh, with an output of 0
    nothing     →  moe: fresh, with an output of 0

A fresh layer has the weights of its initialisation, but its last matrix W2 is 0: the model computes at first exactly
what the source does, and W2 learns from the first step on, the rest from the second.

Of E equal experts y = Σ_k weight_k · Expert(x) = w · mlp(x), where w = Σ_k weight_k. Routers that renormalise (top-k
at k > 1) have w = 1: nothing changes. Switch weights its one expert by p_i < 1, and its output would begin several
times too small; so W2 is divided by w̄, the mean of w. The logits of a fresh linear router are nearly normal, with a
variance that depends on x through its length only, so that w̄ is measured on normal noise behind the step's norm. What
remains is the scatter of w around w̄; docs/upcycling.md has the loss at step 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.mlp import MLP, MLPConfig
from switchmamba.layers.feed_forward.moe import MoE, MoEConfig
from switchmamba.layers.interface import LayerConfig, SequenceInfo
from switchmamba.models.blocks import ResidualStep
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel

Experts = Literal["copy", "fresh"]
"""What an ``mlp`` leaves to the ``moe`` in its place: every expert is a copy of it, or nothing."""

_PROBES = 4096


@dataclass(frozen=True)
class StepOrigin:
    """Where a residual step of the target comes from.

    Attributes:
        step: number of the source's step; None: the step is new.
        branches: each branch's name and the name of the source's branch that it comes from; None: it is new.
    """

    step: int | None
    branches: tuple[tuple[str, str | None], ...]


def upcycle(source: LanguageModel, config: ModelConfig, experts: Experts = "copy") -> LanguageModel:
    """Return a model of ``config`` that continues ``source``, on its device, in its dtype and mode.

    Fresh weights are drawn from torch's global generator.

    Args:
        source: any trained model; it stays as it is.
        config: the target. Its steps are the source's in order, an ``mlp`` being the same or a ``moe``, and any number
            of new ``moe`` steps or branches between them.
        experts: "copy" makes every expert the ``mlp`` in whose place it stands; "fresh" forgets that ``mlp``.

    Raises:
        ConfigError: a layer of either has no counterpart; names it, both patterns, and the fields that differ.
    """
    origins = plan(source.config, config, experts)
    model = LanguageModel(config).to(source.embedding.weight).train(source.training)
    old_steps = list(source.steps())
    with torch.no_grad():
        _copy(model.embedding, source.embedding)
        _copy(model.head, source.head)
        _copy(model.final_norm, source.final_norm)
        for step, origin in zip(model.steps(), origins, strict=True):
            _fill(step, origin, None if origin.step is None else old_steps[origin.step], experts)
    return model


def plan(source: ModelConfig, target: ModelConfig, experts: Experts = "copy") -> list[StepOrigin]:
    """Return the origin of every residual step of ``target``, from the configurations alone.

    Where several steps of the target could take a step of the source, the first one does. Raises as :func:`upcycle`.
    """
    if experts not in get_args(Experts):
        raise ConfigError(f"experts = {experts!r} is neither 'copy' nor 'fresh'")
    kept: tuple[str, ...] = ("vocab_size", "d_model", "norm", "norm_eps", "final_norm", "tie_embeddings")
    if any(source.norms_of(step) > 1 for step in source.steps):
        kept += ("norm_per_branch",)
    changed = [name for name in kept if getattr(source, name) != getattr(target, name)]
    if changed:
        values = ", ".join(
            f"model.{name} ({getattr(source, name)!r} → {getattr(target, name)!r})" for name in changed
        )
        raise ConfigError(f"upcycling cannot change {values}; give the target the source's value")
    pairs = _Pairs(source, target, experts)
    taken = _align(len(source.steps), len(target.steps), pairs.fit, pairs.may_be_new)
    if taken is None:
        raise ConfigError(
            f"({source.written_pattern}) × {source.num_blocks} cannot become "
            f"({target.written_pattern}) × {target.num_blocks}: {pairs.why_not()}"
        )
    return [
        StepOrigin(i, tuple(zip(names, pairs.branches(i, j), strict=True)))
        for j, (names, i) in enumerate(zip(target.steps, taken, strict=True))
    ]


@dataclass(frozen=True)
class _Pairs:
    """Steps i of the source and j of the target."""

    source: ModelConfig
    target: ModelConfig
    experts: Experts

    def branches(self, i: int | None, j: int) -> list[str | None]:
        """Return the source's branch that each branch of step j takes; all None if step j cannot be step i."""
        new = self.target.steps[j]
        old = [] if i is None else self.source.steps[i]
        taken = _align(
            len(old),
            len(new),
            lambda a, b: self.obstacle(old[a], new[b]) is None,
            lambda b: _may_be_new(self.target.layers[new[b]]),
        )
        return [None if a is None else old[a] for a in taken or [None] * len(new)]

    def fit(self, i: int, j: int) -> bool:
        """Say whether step i can become step j."""
        return any(name is not None for name in self.branches(i, j))

    def may_be_new(self, j: int) -> bool:
        """Say whether step j needs nothing of the source."""
        return all(_may_be_new(self.target.layers[name]) for name in self.target.steps[j])

    def obstacle(self, old: str, new: str) -> str | None:
        """Say what keeps layer ``old`` of the source from becoming ``new``; None: nothing."""
        return _obstacle(self.source.layers[old], self.target.layers[new], self.experts)

    def why_not(self) -> str:
        """Say where the two part, taking steps as early as possible, and which fields are to blame if any are."""
        i, blame = 0, ""
        for j, new in enumerate(self.target.steps):
            old = self.source.steps[i] if i < len(self.source.steps) else []
            if old and self.fit(i, j):
                i += 1
                continue
            for old_name, new_name in zip(old, new, strict=False):
                reason = self.obstacle(old_name, new_name)
                if not blame and reason is not None and reason != _OTHER_KIND:
                    blame = f"layers.{j}.{new_name} {reason}"
            if not self.may_be_new(j):
                meets = f"meets layers.{i}.{' + '.join(old)}" if old else "comes after the last layer"
                return blame or (
                    f"the target's layers.{j}.{' + '.join(new)} {meets} of the source; only moe layers can be new"
                )
        left = len(self.source.steps) - i
        return blame or (
            f"the source's layers.{i}.{' + '.join(self.source.steps[i])} has no place left in the target, nor has what "
            f"follows ({left} in all); raise the target's num_blocks or change its pattern"
        )


def _align(
    old: int, new: int, fit: Callable[[int, int], bool], may_be_new: Callable[[int], bool]
) -> list[int | None] | None:
    """Return for each of ``new`` things which of ``old`` it takes, all of them in order; None if that cannot be.

    As early as possible; what takes nothing must be allowed to be new.
    """
    # possible[i][j]: what is left from i on can become what is left from j on
    possible = [[False] * new + [i == old] for i in range(old + 1)]

    def takes(i: int, j: int) -> bool:
        return i < old and possible[i + 1][j + 1] and fit(i, j)

    for i in range(old, -1, -1):
        for j in range(new - 1, -1, -1):
            possible[i][j] = takes(i, j) or (possible[i][j + 1] and may_be_new(j))
    if not possible[0][0]:
        return None
    taken: list[int | None] = []
    i = 0
    for j in range(new):
        taken.append(i if takes(i, j) else None)
        i += taken[-1] is not None
    return taken


def _may_be_new(config: LayerConfig) -> bool:
    return isinstance(config, MoEConfig)


_OTHER_KIND = "is of another kind"


def _obstacle(old: LayerConfig, new: LayerConfig, experts: Experts) -> str | None:
    """Complete the sentence why the layer ``new`` cannot be made of ``old``; None: it can."""
    if type(old) is type(new):
        before, after = old.model_dump(), new.model_dump()
        changed = [name for name in before if before[name] != after[name]]
        values = ", ".join(f"{name} ({before[name]!r} → {after[name]!r})" for name in changed)
        return f"changes {values}; give it the source's values" if changed else None
    if not (isinstance(old, MLPConfig) and isinstance(new, MoEConfig)):
        return _OTHER_KIND
    if experts == "fresh":
        return None
    if old.activation != new.activation:
        return (
            f"has activation = {new.activation!r}, the mlp in its place {old.activation!r}; make them equal"
        )
    width = new.d_expert if new.shared is None else new.shared.d_ff
    if old.d_ff != width:
        of = "d_expert" if new.shared is None else "num_shared_experts · d_expert"
        return f"has {of} = {width}, the mlp in its place d_ff = {old.d_ff}; make them equal"
    if new.shared is None and not new.router.drops:
        return (
            "has a router whose experts do not read each token once, so that copies of the mlp would not compute it; "
            "add shared experts of the mlp's width, or choose experts = 'fresh'"
        )
    return None


def _fill(step: ResidualStep, origin: StepOrigin, old: ResidualStep | None, experts: Experts) -> None:
    old_norms = {} if old is None else dict(zip(old.branch_names, old.branch_norms(), strict=True))
    for (name, old_name), norm in zip(origin.branches, step.branch_norms(), strict=True):
        layer = step.get_submodule(name)
        former = None
        if old is not None and old_name is not None:
            _copy(norm, old_norms[old_name])
            former = old.get_submodule(old_name)
        if former is not None and type(layer) is type(former):
            _copy(layer, former)
            continue
        assert isinstance(layer, MoE)
        _silence(layer)
        if isinstance(former, MLP) and experts == "copy":
            if layer.shared is not None:
                _copy(layer.shared, former)
            else:
                _spread(layer, former, norm)


def _copy(to: nn.Module, of: nn.Module) -> None:
    to.load_state_dict(of.state_dict())


def _silence(moe: MoE) -> None:
    """Let the layer's output be 0."""
    moe.w2_EDF.zero_()
    if moe.shared is not None:
        moe.shared.down_proj.weight.zero_()


def _spread(moe: MoE, mlp: MLP, norm: nn.Module) -> None:
    """Make every expert of ``moe``, behind ``norm``, the ``mlp``; both keep SwiGLU's gate before its up part."""
    moe.w1_EFD.copy_(mlp.up_proj.weight)
    moe.w2_EDF.copy_(mlp.down_proj.weight / _mean_combine_weight(moe, norm))


def _mean_combine_weight(moe: MoE, norm: nn.Module) -> Tensor:
    """Return w̄, the mean over tokens of the sum of their experts' weights; exactly 1 of a router that renormalises."""
    noise = torch.randn(1, _PROBES, moe.w1_EFD.shape[-1]).to(moe.w1_EFD)
    zeros_B = torch.zeros(1, dtype=torch.int64, device=noise.device)
    training = moe.training
    routing = moe.eval().router.route(norm(noise), SequenceInfo(None, None, zeros_B, zeros_B))
    moe.train(training)
    total_T = routing.expert_weight_TK.sum(-1)
    ones_T = torch.ones_like(total_T)
    return ones_T[0] if torch.allclose(total_T, ones_T) else total_T.mean()
