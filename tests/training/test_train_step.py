"""One step: what it minimises, how it cuts batches, and that nothing non-finite gets through."""

import math

import pytest
import torch
from torch import nn

from switchmamba.config import validate
from switchmamba.data.sampler import Batch
from switchmamba.errors import NonFiniteError
from switchmamba.layers.interface import RouterStats
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import RunConfig, TrainingConfig
from switchmamba.training.losses import auxiliary_loss, compute_losses
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.train_step import StepResult, train_step
from tests.training.tiny_run import tiny_tables

VOCAB = 40


def tiny_model(*overrides: tuple[str, object], seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    tables = tiny_tables(("model.vocab_size", VOCAB), *overrides)
    return LanguageModel(validate(RunConfig, tables, "tiny").model)


def tiny_batch(rows: int = 4, length: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
    ids = (torch.arange(length + 1) >= torch.randint(3, length, (rows, 1), generator=generator)).long()
    targets = tokens[:, 1:].clone()
    targets[ids[:, 1:] != ids[:, :-1]] = -100
    targets[0, 5:] = -100  # rows with different numbers of targets
    return Batch(tokens[:, :-1].contiguous(), targets, ids[:, :-1].contiguous())


DROPLESS = ("model.layers.moe.capacity_factor", None)


def step(model: LanguageModel, batch: Batch, rate: float = 1e-2, **settings: object) -> StepResult:
    config = TrainingConfig(batch_size=4, **settings)  # type: ignore[arg-type]
    return train_step(model, build_optimizer(model, config), batch, config, rate)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_accumulation_equals_one_big_batch(micro_batch_size: int) -> None:
    settings = {"load_balance_coef": 0.0, "gradient_clip": None, "eps": 1e-3}
    whole, cut = tiny_model(DROPLESS), tiny_model(DROPLESS)
    one = step(whole, tiny_batch(), **settings)
    many = step(cut, tiny_batch(), micro_batch_size=micro_batch_size, **settings)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], gradient, rtol=1e-4, atol=1e-7)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
    for a, b in zip(one.router_stats, many.router_stats, strict=True):
        assert torch.equal(a.tokens_per_expert_E, b.tokens_per_expert_E)
        assert int(a.num_tokens) == int(b.num_tokens) == 64


def test_the_loss_is_the_cross_entropy_of_the_logits_over_the_targets_that_count() -> None:
    model, batch = tiny_model(DROPLESS), tiny_batch()
    with torch.no_grad():
        logits = model(batch.tokens_BL, batch.document_ids_BL).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets_BL.flatten(), ignore_index=-100
    )
    assert step(model, batch).loss == pytest.approx(float(expected), rel=1e-5)


def test_auxiliary_losses_move_the_gradient_and_never_the_logged_loss() -> None:
    plain, balanced = tiny_model(), tiny_model()
    without = step(plain, tiny_batch(), load_balance_coef=0.0, gradient_clip=None)
    with_aux = step(balanced, tiny_batch(), load_balance_coef=10.0, router_z_coef=1.0, gradient_clip=None)
    assert with_aux.loss == without.loss
    name = "layers.1.moe.router.weight"
    assert not torch.allclose(gradients(plain)[name], gradients(balanced)[name])
    assert torch.equal(gradients(plain)["head.weight"], gradients(balanced)["head.weight"])


def test_the_auxiliary_loss_is_the_weighted_mean_over_routers() -> None:
    model, batch = tiny_model(), tiny_batch()
    config = TrainingConfig(load_balance_coef=0.5, router_z_coef=0.25)
    losses = compute_losses(model, batch.tokens_BL, batch.targets_BL, batch.document_ids_BL, config)
    first, second = losses.router_stats
    expected = 0.5 * (first.load_balance_loss + second.load_balance_loss) / 2
    expected = expected + 0.25 * (first.z_loss + second.z_loss) / 2
    auxiliary = auxiliary_loss(losses.router_stats, config)
    assert auxiliary is not None
    torch.testing.assert_close(auxiliary, expected)
    assert auxiliary_loss((), config) is None


def test_routers_of_different_kinds_count_alike() -> None:
    def stats(experts: int, top_k: int, seed: int) -> RouterStats:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 9, (experts,), generator=generator)
        none = torch.zeros((), dtype=torch.int64)
        probability_E, squared = torch.rand(experts, generator=generator), torch.rand((), generator=generator)
        return RouterStats(tokens, probability_E, squared, squared, none, tokens.sum() // top_k, top_k)

    kinds = (stats(4, 1, 0), stats(6, 1, 1), stats(4, 2, 2), stats(4, 1, 3))
    expected = sum(float(one.load_balance_loss + 0.5 * one.z_loss) for one in kinds) / 4
    config = TrainingConfig(load_balance_coef=1.0, router_z_coef=0.5)
    found = auxiliary_loss(kinds, config)
    assert found is not None and float(found) == pytest.approx(expected, rel=1e-6)
    without_z = auxiliary_loss(kinds, TrainingConfig(load_balance_coef=1.0, router_z_coef=0.0))
    assert without_z is not None
    assert float(without_z) == pytest.approx(sum(float(one.load_balance_loss) for one in kinds) / 4, rel=1e-6)


def test_recomputation_keeps_routing_and_gradients() -> None:
    kept, recomputed = tiny_model(), tiny_model()
    a = step(kept, tiny_batch(), router_z_coef=0.1)
    b = step(recomputed, tiny_batch(), router_z_coef=0.1, activation_recompute=True)
    assert a.loss == b.loss
    for ours, theirs in zip(a.router_stats, b.router_stats, strict=True):
        assert torch.equal(ours.tokens_per_expert_E, theirs.tokens_per_expert_E)
        assert int(ours.dropped) == int(theirs.dropped)
    for name, gradient in gradients(kept).items():
        torch.testing.assert_close(gradients(recomputed)[name], gradient, rtol=1e-6, atol=1e-9)


def test_clipping_scales_the_gradient_to_the_norm_and_reports_the_one_before() -> None:
    free, clipped = tiny_model(), tiny_model()
    norm = step(free, tiny_batch(), gradient_clip=None).grad_norm
    limit = norm / 3
    assert step(clipped, tiny_batch(), gradient_clip=limit).grad_norm == norm
    total = torch.stack([g.norm() for g in gradients(clipped).values()]).norm()
    assert float(total) == pytest.approx(limit, rel=1e-4)
    assert norm == pytest.approx(
        float(torch.stack([g.norm() for g in gradients(free).values()]).norm()), rel=1e-5
    )


def test_a_tiny_batch_is_learnt_by_heart() -> None:
    model, batch = tiny_model(), tiny_batch()
    config = TrainingConfig(batch_size=4, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    losses = [train_step(model, optimizer, batch, config, 1e-2).loss for _ in range(150)]
    assert losses[0] > 3
    assert losses[-1] < 0.05


def test_bf16_autocast_stays_near_fp32_and_keeps_parameters_in_fp32() -> None:
    precise, rough = tiny_model(DROPLESS), tiny_model(DROPLESS)
    a = step(precise, tiny_batch())
    b = step(rough, tiny_batch(), precision="bf16")
    assert b.loss == pytest.approx(a.loss, rel=1e-2)
    assert b.loss != a.loss
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(rough).values()} == {torch.float32}


def test_a_batch_without_targets_changes_no_number_into_nan() -> None:
    batch, model = tiny_batch(), tiny_model()
    batch.targets_BL.fill_(-100)
    result = step(model, batch)
    assert result.loss is None
    assert math.isfinite(result.grad_norm)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Poison(nn.Module):
    """Passes its input on, with one NaN or infinity in it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x[..., :1], self.value), x[..., 1:]], dim=-1)


class PoisonGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(_context: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_layer(value: float) -> None:
    model = tiny_model()
    before = weights(model)
    model.layers[2].mamba.out_proj = nn.Sequential(model.layers[2].mamba.out_proj, Poison(value))
    with pytest.raises(NonFiniteError, match=r"first out of layers\.2\.mamba\.out_proj\.1") as stop:
        step(model, tiny_batch())
    assert "\n" not in str(stop.value)
    model.layers[2].mamba.out_proj = model.layers[2].mamba.out_proj[0]
    assert_unchanged(model, before)


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_parameter() -> None:
    model = tiny_model()
    before = weights(model)
    # The gradient turns bad behind layer 2's norm: the last parameter that it reaches is that norm's weight.
    model.layers[2].norm.register_forward_hook(lambda _module, _inputs, output: PoisonGradient.apply(output))
    with pytest.raises(NonFiniteError, match=r"first at parameter layers\.2\.norm\.weight"):
        step(model, tiny_batch())
    assert_unchanged(model, before)


def test_a_parameter_that_is_not_finite_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.layers[2].mamba.A_log[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter layers\.2\.mamba\.A_log holds NaN"):
        step(model, tiny_batch())
