"""An adapter takes part wherever it is put: on no layer kind is it a silent no-op, and merged it is the same model."""

import json

import pytest
import torch
from torch import nn

from switchmamba import LanguageModel
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.layers.interface import SequenceInfo
from switchmamba.layers.mixers import mamba
from switchmamba.models.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    LoraSettings,
    LoraTargets,
    adapter_config,
    adapter_tensors,
    add_lora,
    base_tensors,
    has_lora,
    load_adapter,
    lora_targets,
    merged_tensors,
    select_targets,
)
from switchmamba.training.config import TrainingConfig
from switchmamba.training.losses import compute_losses
from tests.layers.contract import LAYERS, model_config

pytest.importorskip("peft")

TOKENS = torch.arange(12).view(2, 6) * 7 % 50
PARALLEL = ("mamba", "moe-switch")


def build(*pattern: str, **fields: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(model_config(list(pattern), num_blocks=1, **fields)).double().eval()


def lift(model: nn.Module, only: str = "", std: float = 0.2) -> None:
    """Give the adapter of one target, or of all, a B (an embedding's is its A) that is not 0."""
    for name, parameter in model.named_parameters():
        if ("lora_B." in name or "lora_embedding_A." in name) and only in name:
            nn.init.normal_(parameter, std=std)


def decoded(model: LanguageModel) -> torch.Tensor:
    """Logits of all tokens but the first, read one by one in place."""
    with torch.inference_mode():
        state = model(TOKENS[:, :1]).state
        state = model.state_from_tensors({name: t.clone() for name, t in state.tensors().items()})
        return torch.stack([model.decode_(TOKENS[:, t], state) for t in range(1, TOKENS.shape[1])], dim=1)


@pytest.mark.parametrize("name", LAYERS)
def test_every_target_of_every_layer_changes_the_output_gets_a_gradient_and_merges(name):
    model = build(name)
    decodes = model.causal and not model.state_grows
    targets = lora_targets(model)
    add_lora(model, LoraSettings(rank=2, targets=list(targets)))
    assert has_lora(model)
    with torch.no_grad():
        plain = model(TOKENS).logits
    assert torch.equal(plain, build(name)(TOKENS).logits.detach())  # B is 0
    pairs = [n for n, _ in model.named_parameters() if "lora_B." in n or "lora_embedding_A." in n]
    assert len(pairs) == sum(len(t.modules) + len(t.parameters) for t in targets.values())
    for pair in pairs:  # each by itself
        lift(model, only=pair)
        with torch.no_grad():
            changed = (model(TOKENS).logits - plain).abs().max()
            assert changed > 1e-10, pair
            if decodes:
                assert (decoded(model) - plain[:, 1:]).abs().max() > 1e-10, pair
            model.get_parameter(pair).zero_()
    lift(model)
    logits = model(TOKENS).logits
    logits.square().mean().backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in learning)
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in learning.values())
    if decodes:
        torch.testing.assert_close(decoded(model), logits[:, 1:].detach(), rtol=1e-9, atol=1e-9)
    merged = build(name)
    merged.load_state_dict(merged_tensors(model))
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-9, atol=1e-9)


def test_targets_are_listed_by_kind_of_layer_without_convolutions_and_routers():
    model = build("inner-moe-odd-inner", "mamba", "attention", "mlp-relu", "moe-shared")
    targets = lora_targets(model)
    assert targets["mamba"].modules == tuple(
        f"layers.1.mamba.{projection}" for projection in ("in_proj", "x_proj", "dt_proj", "out_proj")
    )
    assert targets["attention"].modules == tuple(f"layers.2.attention.{p}_proj" for p in "qkvo")
    assert targets["mlp"].modules == ("layers.3.mlp-relu.up_proj", "layers.3.mlp-relu.down_proj")
    assert targets["moe"].modules == (
        "layers.4.moe-shared.shared.up_proj",
        "layers.4.moe-shared.shared.down_proj",
    )
    assert "layers.4.moe-shared.w1_EFD" in targets["experts"].parameters
    assert "layers.0.inner-moe-odd-inner.gate_proj.w2_EDF" in targets["experts"].parameters
    assert "layers.0.inner-moe-odd-inner.conv_proj" in targets["inner_moe_mamba"].modules
    names = [name for t in targets.values() for name in (*t.modules, *t.parameters)]
    assert len(set(names)) == len(names)
    assert not any("conv1d" in name or "router" in name for name in names)
    holder = nn.ModuleDict({"model": model})
    assert lora_targets(holder)["head"] == LoraTargets(modules=("model.head",))


def test_embedding_and_head_are_adapted_only_when_asked_for_and_not_when_they_share_a_weight():
    assert "head" not in select_targets(build("mamba"), None).modules
    tied = build("mamba", tie_embeddings=True)
    assert not {"head", "embedding"} & lora_targets(tied).keys()
    with pytest.raises(ConfigError, match="share a weight"):
        select_targets(tied, ["mamba", "head"])
    with pytest.raises(ConfigError, match="did you mean experts"):
        select_targets(build("moe-switch"), ["expert"])


def test_the_head_of_a_hugging_face_model_is_a_target_unless_it_shares_its_weight():
    pytest.importorskip("transformers")
    from switchmamba.hf.native import from_native

    wrapped = from_native(build("mamba"))
    ends = {end: lora_targets(wrapped)[end].modules for end in ("embedding", "head")}
    assert ends == {"embedding": ("model.backbone.embedding",), "head": ("lm_head",)}
    assert "head" not in lora_targets(wrapped.model)
    assert "head" not in lora_targets(from_native(build("mamba", tie_embeddings=True)))


@pytest.mark.parametrize("reach", ["head", "embedding"])
def test_a_wrapped_end_that_shares_its_weight_is_refused(reach):
    from peft import LoraConfig, inject_adapter_in_model

    model = build("mamba", tie_embeddings=True)
    inject_adapter_in_model(LoraConfig(target_modules=[reach]), model)
    with pytest.raises(ConfigError, match="share a weight"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("layer", "targets", "named"),
    [
        ("mamba", {"target_modules": ["conv1d"], "r": 48}, "conv1d"),
        ("mamba2", {"target_modules": ["conv1d"], "r": 64}, "conv1d"),
        ("moe-switch", {"target_parameters": ["router.weight"], "target_modules": []}, "router"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
def test_what_would_be_passed_by_is_refused(layer, targets, named):
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(**targets), build(layer))
    with pytest.raises(ConfigError, match=f"{named} is wrapped"):
        model(TOKENS)


@pytest.mark.parametrize("projection", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_fused_step_does_not_pass_a_wrapped_projection_by(projection, monkeypatch):
    def fused(*_arguments: object) -> None:
        raise AssertionError("the fused step was taken")

    monkeypatch.setattr(mamba, "fused_step_unavailable", lambda *_: None)
    monkeypatch.setattr(mamba, "inward_step_", fused)
    model = build("mamba")
    with pytest.raises(AssertionError, match="fused"):
        decoded(model)
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=[projection]), model)
    lift(model)
    torch.testing.assert_close(decoded(model), model(TOKENS).logits[:, 1:].detach(), rtol=1e-9, atol=1e-9)


def test_a_wrapped_expert_layer_is_no_fused_step_and_no_captured_one(monkeypatch):
    from switchmamba.layers.feed_forward import moe

    model = build("moe-switch")
    layer = next(model.iterate_layers())
    monkeypatch.setattr(moe, "fused_step_unavailable", lambda *_: None)
    monkeypatch.setattr(moe, "waits_for_device", lambda *_: "it waits")
    monkeypatch.setattr(moe, "experts_step", lambda *_: pytest.fail("the fused step was taken"))
    assert model.why_not_capturable(torch.float32, decoding=True) is None
    add_lora(model, LoraSettings(targets=["experts"]))
    lift(model)
    assert next(model.iterate_layers()) is layer
    assert (
        model.why_not_capturable(torch.float32, decoding=True)
        == "layers.0.moe-switch.base_layer.base_layer: it waits"
    )
    torch.testing.assert_close(decoded(model), model(TOKENS).logits[:, 1:].detach(), rtol=1e-9, atol=1e-9)


def test_a_wrapped_norm_is_called():
    from switchmamba.models.blocks import _sum_and_norm

    class Doubled(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.weight, self.eps = norm, norm.weight, norm.eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base_layer(x)

    norm = Doubled(nn.RMSNorm(4, device="meta"))
    calls = []
    norm.base_layer.register_forward_hook(lambda *_: calls.append("called"))
    _sum_and_norm(norm, torch.empty(2, 4, device="meta"), None)
    assert calls == ["called"]


def test_the_training_loss_sees_an_adapter_on_the_head():
    model = build("mamba")
    add_lora(model, LoraSettings(targets=["head"]))
    lift(model)
    targets = TOKENS.roll(-1, 1).clone()
    targets[:, -1] = -100
    config = TrainingConfig(precision="fp32")
    loss = compute_losses(model, TOKENS, targets, None, config).cross_entropy_sum
    logits = model(TOKENS).logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="the head is wrapped"):
        _ = model.head_weight


def test_recomputed_activations_give_the_same_gradients_with_adapted_experts():
    found = []
    for recompute in (False, True):
        model = build(*PARALLEL)
        torch.manual_seed(1)
        add_lora(model, LoraSettings(rank=2))
        lift(model)
        config = TrainingConfig(precision="fp32", activation_recompute=recompute)
        compute_losses(model, TOKENS, TOKENS.roll(-1, 1), None, config).cross_entropy_sum.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again)


def test_the_adapter_file_is_pefts_and_merging_is_pefts_to_the_last_bit(tmp_path):
    from peft import PeftModel
    from safetensors.torch import save_file

    model = build(*PARALLEL)
    add_lora(model, LoraSettings(rank=3, alpha=5, targets=list(lora_targets(model))))
    lift(model)
    save_file(adapter_tensors(model), tmp_path / ADAPTER)
    (tmp_path / ADAPTER_CONFIG).write_bytes(adapter_config(model))
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["r"] == 3

    fresh = build(*PARALLEL)
    theirs = PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-12, atol=1e-12)
    unloaded = theirs.merge_and_unload()
    assert isinstance(unloaded, LanguageModel)
    ours = merged_tensors(model)
    assert ours.keys() == dict(unloaded.named_parameters()).keys()
    assert all(torch.equal(ours[name], p) for name, p in unloaded.named_parameters())
    assert all(torch.equal(t, build(*PARALLEL).get_parameter(n)) for n, t in base_tensors(model).items())

    again = build(*PARALLEL)
    add_lora(again, LoraSettings(rank=3, alpha=5, targets=list(lora_targets(again))))
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    other = build(*PARALLEL)
    add_lora(other, LoraSettings(rank=2, targets=["mamba"]))
    with pytest.raises(CheckpointError, match="unknown"):
        load_adapter(other, tmp_path)


def test_an_adapted_model_in_half_precision_keeps_what_must_stay_in_single():
    model = build(*PARALLEL).float()
    add_lora(model, LoraSettings(rank=2))
    model.to(torch.bfloat16)
    mixer = next(model.iterate_layers())
    assert mixer.dt_proj.bias.dtype == mixer.A_log.dtype == torch.float32
    sequence = SequenceInfo(None, None, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    y = mixer(torch.randn(2, 3, 24, dtype=torch.bfloat16), sequence).y
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
