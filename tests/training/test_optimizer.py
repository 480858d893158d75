"""Which parameters decay, and the optimizer's state by name."""

import pytest
import torch

from switchmamba.errors import CheckpointError
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import TrainingConfig
from switchmamba.training.optimizer import (
    build_optimizer,
    decayed_names,
    load_state_tensors,
    state_tensors,
    update_together,
)
from switchmamba.training.train_step import LaunchedStep, launch_step, train_step
from tests.training.test_train_step import tiny_batch
from tests.training.tiny_run import tiny_config


def tiny_model(**overrides: object) -> LanguageModel:
    config = tiny_config(*((f"model.{name}", value) for name, value in overrides.items())).model
    return LanguageModel(ModelConfig.model_validate({**config.model_dump(), "vocab_size": 40}))


def test_matrices_decay_and_everything_else_is_spared() -> None:
    names = {name for name, _ in tiny_model().named_parameters()}
    decayed = decayed_names(tiny_model(), TrainingConfig())
    spared = {name for name in names if name.endswith((".A_log", ".D", ".bias", "norm.weight"))}
    assert names - decayed == spared | {"embedding.weight"}
    assert {"head.weight", "layers.0.mamba.in_proj.weight", "layers.0.mamba.dt_proj.weight"} <= decayed
    assert sum(".moe." in name for name in decayed) == 6  # router, w1 and w2 of two layers


def test_a_tied_head_is_an_embedding_and_does_not_decay() -> None:
    model = tiny_model(tie_embeddings=True)
    assert not {"embedding.weight", "head.weight"} & decayed_names(model, TrainingConfig())


def test_the_papers_scope_decays_everything() -> None:
    model = tiny_model()
    names = decayed_names(model, TrainingConfig(weight_decay_scope="all"))
    assert names == {name for name, _ in model.named_parameters()}


def test_decay_alone_shrinks_only_the_decayed_parameters() -> None:
    model = tiny_model()
    config = TrainingConfig(learning_rate=0.5, weight_decay=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = decayed_names(model, config)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.9 if name in decayed else 1.0))


@pytest.mark.parametrize("queued", [False, True])
def test_routers_and_experts_step_by_their_share_of_the_learning_rate(queued: bool) -> None:
    # Adam's first step is the learning rate itself wherever a gradient is far above eps, whichever its size.
    torch.manual_seed(0)
    ratios = {"router_learning_rate_ratio": 0.1, "expert_learning_rate_ratio": 0.5}
    config = TrainingConfig(**ratios, weight_decay=0, gradient_clip=None, eps=1e-14)  # type: ignore[arg-type]
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take = launch_step if queued else train_step
    step = take(model, build_optimizer(model, config), tiny_batch(), config, 1e-2)
    if isinstance(step, LaunchedStep):
        step.result()
    largest = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    for name, step_size in largest.items():
        ratio = 0.1 if ".router." in name else 0.5 if name.endswith(("w1_EFD", "w2_EDF")) else 1.0
        assert step_size == pytest.approx(1e-2 * ratio, rel=1e-2), name


def test_small_tensors_updated_together_are_what_adamw_does_to_each() -> None:
    torch.manual_seed(0)
    group = {"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}
    ours = [torch.randn(shape) for shape in ((3,), (4, 5), (1,))]
    theirs = [tensor.clone().double().requires_grad_() for tensor in ours]
    state = [(torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for stopped in (0.0, 0.0, 1.0, 0.0):
        gradients, before = [torch.randn_like(p) for p in ours], [p.clone() for p in ours]
        if not stopped:
            for parameter, gradient in zip(theirs, gradients, strict=True):
                parameter.grad = gradient.double() / 3
            optimizer.step()
        tensors = [(p, g, *own) for p, g, own in zip(ours, gradients, state, strict=True)]
        update_together(tensors, group, torch.tensor(1e-2), torch.tensor(3.0), torch.tensor(stopped))
        if stopped:
            assert all(torch.equal(p, same) for p, same in zip(ours, before, strict=True))
    for ours_now, truth, (_, _, step) in zip(ours, theirs, state, strict=True):
        torch.testing.assert_close(ours_now.double(), truth.detach(), rtol=1e-6, atol=1e-7)
        assert float(step) == 3


def stepped(model: LanguageModel) -> torch.optim.AdamW:
    optimizer = build_optimizer(model, TrainingConfig())
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_the_state_by_name_goes_back_where_it_was() -> None:
    model = tiny_model()
    tensors = state_tensors(stepped(model), model)
    assert len(tensors) == 3 * len(list(model.parameters()))
    other = build_optimizer(model, TrainingConfig())
    load_state_tensors(other, model, tensors, source="here")
    again = state_tensors(other, model)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "unknown", "dtype"])
def test_a_state_that_does_not_fit_is_refused_by_name(fault: str) -> None:
    model = tiny_model()
    tensors = state_tensors(stepped(model), model)
    name = "layers.0.mamba.A_log.exp_avg"
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = tensors[name][:1]
    elif fault == "dtype":
        tensors[name] = tensors[name].double()
    else:
        name = "layers.9.mamba.A_log.exp_avg"
        tensors[name] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=f"optimizer.safetensors.*{name}"):
        load_state_tensors(build_optimizer(model, TrainingConfig()), model, tensors, "optimizer.safetensors")
