"""Balance terms, schedules, drawn routing and freezing in training: what they do, and that runs resume bit for bit."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba.config import validate
from switchmamba.errors import ConfigError, NonFiniteError
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.bias_balanced import BiasBalancedRouter
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import load
from switchmamba.training.balance import at_step, changes_with_steps, next_factor, set_capacity
from switchmamba.training.config import RunConfig, TrainingConfig
from switchmamba.training.losses import auxiliary_loss, mean_entropy_loss, mean_l2_loss
from switchmamba.training.optimizer import build_optimizer, state_tensors
from switchmamba.training.parts import freeze, part_names
from switchmamba.training.train_step import launch_step, train_step
from tests.training.test_train_step import PoisonGradient, step, tiny_batch, tiny_model
from tests.training.test_trainer import run
from tests.training.tiny_run import assert_same_run, read_lines, tiny_config, tiny_tables

ROUTER, CAPACITY = "model.layers.moe.router", "model.layers.moe.capacity_factor"


def stats(tokens_per_expert: list[int], probability: list[float] | None = None) -> RouterStats:
    counts = torch.tensor(tokens_per_expert)
    total = int(counts.sum())
    mean = torch.tensor(probability or [n / total for n in tokens_per_expert], requires_grad=True)
    zero = torch.tensor(0)
    return RouterStats(counts, total * mean, zero.float(), zero.float(), zero, zero + total, top_k=1)


# Losses


def test_the_entropy_form_is_zero_at_balance_and_log_e_at_collapse() -> None:
    assert float(mean_entropy_loss((stats([5, 5, 5, 5]),)).detach()) == pytest.approx(0, abs=1e-6)
    assert float(mean_entropy_loss((stats([20, 0, 0, 0]),)).detach()) == pytest.approx(log(4))
    p = [0.5, 0.25, 0.125, 0.125]
    expected = sum(x * log(4 * x) for x in p)
    assert float(mean_entropy_loss((stats([1, 1, 1, 1], p),)).detach()) == pytest.approx(expected)


def test_an_expert_of_no_probability_leaves_the_gradient_finite() -> None:
    seen = stats([5, 5], [1.0, 0.0])
    for form in (mean_entropy_loss, mean_l2_loss):
        (gradient,) = torch.autograd.grad(form((seen,)), seen.probability_sum_E, retain_graph=True)
        assert gradient.isfinite().all()


def test_the_l2_form_is_the_squared_coefficient_of_variation() -> None:
    assert float(mean_l2_loss((stats([5, 5, 5, 5]),)).detach()) == pytest.approx(0, abs=1e-6)
    assert float(mean_l2_loss((stats([20, 0, 0, 0]),)).detach()) == pytest.approx(3)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    expected = float((p.std(correction=0) / p.mean()) ** 2)
    assert float(mean_l2_loss((stats([1, 1, 1, 1], p.tolist()),)).detach()) == pytest.approx(
        expected, rel=1e-5
    )


def test_straight_through_counts_would_be_twice_the_loss_of_switch() -> None:
    seen = stats([6, 3, 1, 0], [0.5, 0.25, 0.2, 0.05])
    mean = seen.probability_sum_E / 10
    straight_through = seen.fraction_E + mean - mean.detach()
    (ours,) = torch.autograd.grad(
        4 * straight_through.square().sum(), seen.probability_sum_E, retain_graph=True
    )
    (switch,) = torch.autograd.grad(seen.load_balance_loss, seen.probability_sum_E)
    torch.testing.assert_close(ours, 2 * switch)


@pytest.mark.parametrize("name", ["load_balance_entropy_coef", "load_balance_l2_coef"])
def test_a_balance_form_pulls_the_router_and_is_weighted_by_its_coefficient(name: str) -> None:
    seen = (stats([6, 3, 1, 0], [0.5, 0.25, 0.2, 0.05]),)
    form = mean_entropy_loss if "entropy" in name else mean_l2_loss
    config = TrainingConfig(load_balance_coef=0.0, **{name: 0.5})
    loss = auxiliary_loss(seen, config)
    assert loss is not None
    torch.testing.assert_close(loss, 0.5 * form(seen))
    (gradient,) = torch.autograd.grad(loss, seen[0].probability_sum_E)
    assert gradient[0] > gradient[1] > gradient[2] > gradient[3]


def test_a_policy_gradient_router_learns_only_by_its_loss() -> None:
    name = "layers.1.moe.router.weight"
    gradients = {}
    for coef in (0.0, 1.0, 2.0):
        model = tiny_model((ROUTER, {"kind": "policy_gradient"}))
        torch.manual_seed(1)
        step(model, tiny_batch(), load_balance_coef=0.0, router_policy_coef=coef, gradient_clip=None)
        gradients[coef] = dict(model.named_parameters())[name].grad
    assert gradients[0.0] is None or gradients[0.0].eq(0).all()
    assert gradients[1.0].ne(0).any()
    torch.testing.assert_close(gradients[2.0], 2 * gradients[1.0], rtol=1e-4, atol=1e-7)


# Adaptive weight


def test_the_factor_rises_above_the_target_falls_below_it_and_stays_within_bounds() -> None:
    config = TrainingConfig(load_balance_target=1.5, load_balance_gain=0.1)
    uneven, even = (stats([7, 1, 1, 1]),), (stats([5, 5, 5, 5]),)
    assert next_factor(1.0, uneven, config) == pytest.approx((2.8 / 1.5) ** 0.1)
    assert next_factor(1.0, even, config) == pytest.approx((1 / 1.5) ** 0.1)
    assert next_factor(999.0, uneven * 2, config) == 1000.0
    assert next_factor(0.001, even, config) == 0.001
    assert next_factor(2.0, uneven, TrainingConfig()) == 2.0


def test_the_factor_multiplies_the_balance_losses_and_nothing_else() -> None:
    config = TrainingConfig(
        load_balance_target=1.5, load_balance_l2_coef=0.5, router_z_coef=0.25, learning_rate=1e-3
    )
    adapted = at_step(config, 4.0)
    assert (adapted.load_balance_coef, adapted.load_balance_l2_coef) == (0.04, 2.0)
    changed = {
        name for name in TrainingConfig.model_fields if getattr(config, name) != getattr(adapted, name)
    }
    assert changed == {"load_balance_coef", "load_balance_l2_coef"}
    assert at_step(TrainingConfig(), 4.0) == TrainingConfig()


def test_an_adaptive_run_logs_the_factor_that_its_loads_explain(data_dir: Path, tmp_path: Path) -> None:
    run(data_dir, tmp_path / "run", ("training.load_balance_target", 1.2), ("training.steps", 5))
    factor = 1.0
    config = TrainingConfig(load_balance_target=1.2)
    for line in read_lines(tmp_path / "run"):
        seen = tuple(stats([round(64 * f) for f in router["fraction"]]) for router in line["routers"])
        factor = next_factor(factor, seen, config)
        assert line["balance_factor"] == pytest.approx(factor, rel=1e-3)
    assert "balance_factor" not in read_lines_of_a_plain_run(data_dir, tmp_path)[0]


def read_lines_of_a_plain_run(data_dir: Path, tmp_path: Path) -> list[dict[str, Any]]:
    run(data_dir, tmp_path / "plain", ("training.steps", 1))
    return read_lines(tmp_path / "plain")


# Dynamic capacity


def test_the_capacity_goes_linearly_from_the_first_step_to_the_last() -> None:
    model = tiny_model()
    config = TrainingConfig(capacity_schedule=(2.0, 1.0), steps=11)
    for number, expected in ((0, 2.0), (5, 1.5), (10, 1.0), (40, 1.0)):
        set_capacity(model, config, number)
        assert [model.layers[i].moe.capacity_factor for i in (1, 3)] == [pytest.approx(expected)] * 2
    set_capacity(model, TrainingConfig(), 3)
    assert model.layers[1].moe.capacity_factor == pytest.approx(1.0)
    assert changes_with_steps(config) and not changes_with_steps(TrainingConfig())


def test_a_layer_without_capacity_stays_without() -> None:
    model = tiny_model((CAPACITY, None))
    set_capacity(model, TrainingConfig(capacity_schedule=(2.0, 1.0)), 0)
    assert model.layers[1].moe.capacity_factor is None


# Bias


def bias_of(model: LanguageModel) -> torch.Tensor:
    router = model.layers[1].moe.router
    assert isinstance(router, BiasBalancedRouter)
    return router.bias


BIAS = (ROUTER, {"kind": "bias_balanced"})


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_after_a_step_the_bias_follows_the_load_of_the_whole_batch(micro_batch_size: int) -> None:
    model = tiny_model(BIAS, (CAPACITY, None))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = step(model, tiny_batch(), router_bias_rate=0.01, micro_batch_size=micro_batch_size)
    load = result.router_stats[0].tokens_per_expert_E.float()
    torch.testing.assert_close(bias_of(model).detach(), 0.01 * (load.mean() - load).sign())
    assert not torch.equal(before["layers.1.moe.router.weight"], model.layers[1].moe.router.weight)
    names = {
        name.rsplit(".", 1)[0] for name in state_tensors(build_optimizer(model, TrainingConfig()), model)
    }
    assert not any("bias" in name and "router" in name for name in names)


def test_a_step_that_is_not_finite_moves_no_bias() -> None:
    model = tiny_model(BIAS)
    config = TrainingConfig(batch_size=4)
    model.layers[2].norm.register_forward_hook(lambda _module, _inputs, output: PoisonGradient.apply(output))
    with pytest.raises(NonFiniteError):
        train_step(model, build_optimizer(model, config), tiny_batch(), config, 1e-2)
    assert bias_of(model).eq(0).all()
    queued = launch_step(model, build_optimizer(model, config), tiny_batch(), config, 1e-2)
    assert bias_of(model).eq(0).all()
    with pytest.raises(NonFiniteError):
        queued.result()


def test_a_queued_step_moves_the_bias_as_an_awaited_one() -> None:
    config, found = TrainingConfig(batch_size=4), []
    for take in (train_step, launch_step):
        model = tiny_model(BIAS)
        take(model, build_optimizer(model, config), tiny_batch(), config, 1e-2)
        found.append(bias_of(model).detach().clone())
    assert torch.equal(*found)
    assert found[0].ne(0).any()


# Freezing


def test_frozen_parts_stay_and_everything_else_learns() -> None:
    for parts in (["router"], ["experts"], ["router", "experts"]):
        model = tiny_model()
        freeze(model, parts)
        frozen = part_names(model, parts)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = TrainingConfig(batch_size=4)
        optimizer = build_optimizer(model, config)
        train_step(model, optimizer, tiny_batch(), config, 1e-2)
        same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert same == frozen
        assert not any(name.rsplit(".", 1)[0] in frozen for name in state_tensors(optimizer, model))
    assert frozen == {f"layers.{i}.moe.{n}" for i in (1, 3) for n in ("router.weight", "w1_EFD", "w2_EDF")}


def test_shared_experts_are_not_frozen_and_a_frozen_router_keeps_its_bias() -> None:
    model = tiny_model(BIAS, ("model.layers.moe.num_shared_experts", 1))
    freeze(model, ["router", "experts"])
    step(model, tiny_batch())
    assert bias_of(model).eq(0).all()
    shared = model.layers[1].moe.shared.up_proj.weight
    assert shared.grad is not None and shared.grad.ne(0).any()


def test_a_run_may_freeze_when_it_goes_on_and_thaw_again(data_dir: Path, tmp_path: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in load(tmp_path / "run").model.named_parameters()}

    run(data_dir, tmp_path / "run", stop_at=4)
    first = weights()
    run(data_dir, tmp_path / "run", ("training.freeze", ["experts"]), resume=True, stop_at=8)
    second = weights()
    run(data_dir, tmp_path / "run", resume=True)
    third = weights()
    for name in first:
        expert = name.endswith(("w1_EFD", "w2_EDF"))
        assert torch.equal(first[name], second[name]) == expert, name
        assert not torch.equal(second[name], third[name]), name


# Resuming

INNER_MOE: tuple[str, Any] = (
    "model.layers.moe",
    {
        "kind": "inner_moe_mamba",
        "d_state": 4,
        "projections": ["out"],
        "experts": {"num_experts": 4, "d_expert": 6, "activation": "relu", "capacity_factor": 1.25},
    },
)
"""In the place of the MoE layer: one router as well."""

VARIANTS: dict[str, list[tuple[str, Any]]] = {
    "inner-moe": [INNER_MOE, ("training.capacity_schedule", [2.0, 1.0])],
    "parallel-norms": [("model.pattern", [["mamba", "moe"]]), ("model.norm_per_branch", True)],
    "gumbel": [(ROUTER, {"kind": "gumbel", "temperature": 0.7})],
    "policy": [(ROUTER, {"kind": "policy_gradient"})],
    "bias": [BIAS],
    "expert-choice": [(ROUTER, {"kind": "expert_choice"}), (CAPACITY, None)],
    "soft": [(ROUTER, {"kind": "soft", "slots_per_expert": 2}), (CAPACITY, None)],
    "adaptive": [("training.load_balance_target", 1.1)],
    "dynamic-capacity": [("training.capacity_schedule", [2.0, 0.5])],
    "frozen-router": [("training.freeze", ["router"])],
    "shared-recomputed": [
        ("model.layers.moe.num_shared_experts", 1),
        (ROUTER, {"kind": "gumbel"}),
        ("training.activation_recompute", True),
    ],
    "forms": [("training.load_balance_entropy_coef", 0.1), ("training.load_balance_l2_coef", 0.1)],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_continues_bit_for_bit(name: str, data_dir: Path, tmp_path: Path) -> None:
    changes = [*VARIANTS[name], ("training.steps", 8)]
    run(data_dir, tmp_path / "whole", *changes)
    run(data_dir, tmp_path / "cut", *changes, stop_at=4)
    run(data_dir, tmp_path / "cut", *changes, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert all(len(line["routers"]) == 2 for line in read_lines(tmp_path / "whole"))


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.freeze": ["expert"]},
            r"training\.freeze\.0 = 'expert': input should be 'router' or 'experts'",
        ),
        ({"training.freeze": ["router", "router"]}, "name each once"),
        ({"training.capacity_schedule": [2.0]}, r"must be a list of two positive numbers"),
        ({"training.capacity_schedule": [2.0, 0.0]}, r"must be a list of two positive numbers"),
        (
            {"training.capacity_schedule": [2.0, 1.0], CAPACITY: None},
            r"no layer has a capacity; set model\.layers\.NAME\.capacity_factor",
        ),
        (
            {"training.capacity_schedule": [2.0, 1.0], "training.compile": True},
            "which compile would compile anew",
        ),
        (
            {"training.load_balance_target": 1.5, "training.load_balance_coef": 0.0},
            r"load_balance_target = 1\.5 has no loss to steer with; set load_balance_coef",
        ),
        (
            {"training.load_balance_target": 1.0},
            r"load_balance_target = 1\.0: input should be greater than 1",
        ),
        (
            {"training.freeze": ["experts"], "training.expert_learning_rate_ratio": 0.5},
            r"expert_learning_rate_ratio = 0\.5 has no effect on what freeze = \['experts'\] keeps",
        ),
        ({"training.load_balance_entropy": 1.0}, "did you mean load_balance_entropy_coef"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        tiny_config(*changes.items())
    assert "\n" not in str(refusal.value)


def test_training_finds_the_routers_inside_a_mamba_layer() -> None:
    experts = INNER_MOE[1] | {"projections": ["gate", "conv"]}
    config = tiny_config(
        ("model.layers.moe", experts),
        ("training.capacity_schedule", [2.0, 1.0]),
        ("training.freeze", ["router", "experts"]),
    )
    model = LanguageModel(config.model)
    set_capacity(model, config.training, config.training.steps - 1)
    inner = model.layers[1].moe
    assert (inner.conv_proj.capacity_factor, inner.gate_proj.capacity_factor) == (1.0, 1.0)
    assert part_names(model, config.training.freeze) == {
        f"layers.{i}.moe.{projection}.{name}"
        for i in (1, 3)
        for projection in ("conv_proj", "gate_proj")
        for name in ("router.weight", "w1_EFD", "w2_EDF")
    }
    with pytest.raises(ConfigError, match="no layer has a capacity"):
        tiny_config(
            ("model.layers.moe", experts),
            ("model.layers.moe.experts.capacity_factor", None),
            ("training.capacity_schedule", [2.0, 1.0]),
        )


def test_biases_inside_a_mamba_layer_follow_their_own_load() -> None:
    projections = ("model.layers.moe.projections", ["conv", "gate", "out"])
    router = ("model.layers.moe.experts.router", {"kind": "bias_balanced"})
    model = tiny_model(INNER_MOE, projections, router)
    config = TrainingConfig(batch_size=4, router_bias_rate=0.5)
    result = train_step(model, build_optimizer(model, config), tiny_batch(), config, 1e-2)
    routers = [module for module in model.modules() if isinstance(module, BiasBalancedRouter)]
    assert len(routers) == len(result.router_stats) == 6
    for router, seen in zip(routers, result.router_stats, strict=True):
        load = seen.tokens_per_expert_E.float()
        assert torch.equal(router.bias.sign(), (load.mean() - load).sign())


@pytest.mark.parametrize(
    ("name", "value"),
    [("freeze", ["router"]), ("router_learning_rate_ratio", 0.1), ("expert_learning_rate_ratio", 2.0)],
)
def test_treating_apart_what_a_model_without_routers_has_not_is_refused(name: str, value: Any) -> None:
    tables = tiny_tables((f"training.{name}", value), ("model.pattern", ["mamba"]))
    del tables["model"]["layers"]["moe"]
    with pytest.raises(ConfigError, match="no layer of the model has a router; leave it out"):
        validate(RunConfig, tables, "mine.toml")
