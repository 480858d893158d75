"""Adapters on a GPU: no fused kernel passes one by, a captured step trains them alone, merged it is the same model."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from switchmamba.generation.decode_graph import DecodeGraph
from switchmamba.models.lora import LoraSettings, add_lora, lora_targets, merged_tensors
from tests.gpu.small import decoded, logits, masked_batches, model_of, relative, run_config, tokens
from tests.gpu.training_steps import take

INNER = {
    "kind": "inner_moe_mamba",
    "projections": ["conv", "out"],
    "experts": {"num_experts": 4, "d_expert": 64},
}
MODELS = {
    "mamba": ("mamba-tiny", [("model.num_blocks", 2)]),
    "mamba, d_inner not aligned": (
        "mamba-tiny",
        [("model.num_blocks", 2), ("model.layers.mamba.expand", "5/3")],
    ),
    "moe-mamba": ("moe-mamba-tiny", []),
    "mamba2": ("mamba2-tiny", [("model.num_blocks", 2)]),
    "inner moe": ("mamba-tiny", [("model.num_blocks", 2), ("model.layers", {"mamba": INNER})]),
}
models = pytest.mark.parametrize("name", MODELS)


def build(name, device):
    preset, overrides = MODELS[name]
    return model_of(preset, device, overrides)


def adapted(name, device):
    model = build(name, device)
    add_lora(model, LoraSettings(rank=4, targets=list(lora_targets(model))))
    return model


def starts_at_zero(model):
    """Name the half of each adapter that is 0 at first: B, or an embedding's A."""
    return [n for n, _ in model.named_parameters() if "lora_B." in n or "lora_embedding_A." in n]


def lift(model, names, std):
    torch.manual_seed(1)
    for name in names:
        nn.init.normal_(model.get_parameter(name), std=std)


@models
def test_decoding_passes_no_adapter_by(name, device):
    text = tokens(2, 9, device)
    model = adapted(name, device)
    plain, plain_steps = logits(model, text), decoded(model, text)
    assert relative(plain_steps, plain[:, 1:]) < 1e-4
    for pair in starts_at_zero(model):
        lift(model, [pair], std=1.0)
        whole, steps = logits(model, text), decoded(model, text)
        assert not torch.equal(whole, plain), pair
        assert not torch.equal(steps, plain_steps), pair
        assert relative(steps, whole[:, 1:]) < 1e-3, pair
        model.get_parameter(pair).data.zero_()


@models
def test_merged_it_is_the_model_with_the_adapter_decoded_and_captured_too(name, device):
    text = tokens(2, 9, device)
    model, merged = adapted(name, device), build(name, device)
    lift(model, starts_at_zero(model), std=0.1)
    merged.load_state_dict(merged_tensors(model))
    expected = logits(model, text)
    assert relative(expected, logits(build(name, device), text)) > 1e-2
    assert relative(logits(merged, text), expected) < 1e-4
    assert relative(decoded(merged, text), expected[:, 1:]) < 1e-4
    if device.type != "cuda":
        assert not DecodeGraph.serves(merged)
        return
    for kind, served in (("merged", merged), ("adapter", model)):
        if not DecodeGraph.serves(served):
            # Only experts behind an adapter may have to wait for the device.
            assert kind == "adapter" and "experts" in lora_targets(merged)
            continue
        with torch.inference_mode():
            graph = DecodeGraph(served, served(text[:, :-1]).state)
        assert relative(graph.step(text[:, -1]), expected[:, -1]) < 1e-3, kind


ALL = ["experts", "mamba"]
RUNS = {
    "layers and experts": ("moe-mamba-tiny", ALL, []),
    "embedding and head too": ("moe-mamba-tiny", [*ALL, "embedding", "head"], []),
    "fp32": ("mamba-tiny", ["mamba"], [("training.precision", "fp32")]),
    "mamba2": ("mamba2-tiny", ["mamba2"], []),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_captured_step_trains_every_adapter_and_nothing_else(name, device):
    preset, targets, overrides = RUNS[name]
    lora = [
        ("training.lora", {"rank": 4, "targets": targets}),
        ("training.initial_checkpoint", "x"),  # asked for by the configuration; nothing is read here
    ]
    config = run_config(preset, device, *lora, *overrides)

    def prepare(model):
        add_lora(model, config.training.lora)
        lift(model, starts_at_zero(model), std=0.02)

    losses = []
    for graph in (False, True):
        results, moved, still = take(config, masked_batches(), device, graph=graph, prepare=prepare)
        assert moved and all(".lora_" in name for name in moved)
        assert not any(".lora_" in name for name in still)
        losses.append([step.loss for step in results])
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)


def test_a_captured_step_gives_routers_and_experts_their_own_learning_rate(device):
    ratios = [("training.router_learning_rate_ratio", 0.1), ("training.expert_learning_rate_ratio", 0.3)]
    config = run_config("moe-mamba-tiny", device, *ratios)
    losses = [
        [step.loss for step in take(config, masked_batches(), device, graph=graph)[0]]
        for graph in (False, True)
    ]
    assert losses[1] == losses[0]
    same_rate = take(run_config("moe-mamba-tiny", device), masked_batches(), device, graph=True)[0]
    assert [step.loss for step in same_rate] != losses[0]


@pytest.mark.parametrize("frozen", ["router", "experts"])
def test_a_captured_step_leaves_alone_what_is_frozen(frozen, device):
    overrides = [("training.freeze", [frozen]), ("training.load_balance_coef", 0.0)]
    config = run_config("moe-mamba-tiny", device, *overrides)
    losses = []
    for graph in (False, True):
        results, moved, still = take(config, masked_batches(), device, graph=graph)
        parts = (".router.",) if frozen == "router" else (".w1_EFD", ".w2_EDF")
        assert still == {name for name in moved | still if any(part in name for part in parts)} != set()
        losses.append([step.loss for step in results])
    assert losses[1] == losses[0]
