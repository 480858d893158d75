"""decode_ is the forward pass of one token, whatever the layers."""

import pytest
import torch

from switchmamba import LanguageModel, presets
from tests.layers.contract import PATTERNS, build_layer, example_model

FIXED = [name for name in presets if name.endswith("-tiny") and "transformer" not in name]
EXAMPLES = [
    name for name in PATTERNS if not name.startswith("transformer") and name not in {"hybrid", "jamba"}
]


@pytest.mark.parametrize("name", FIXED + EXAMPLES)
def test_decoding_in_place_equals_the_forward_pass(name):
    torch.manual_seed(0)
    model = LanguageModel(example_model(name)) if name in PATTERNS else LanguageModel.from_preset(name)
    model = model.double().eval()
    tokens = torch.randint(0, model.config.vocab_size, (3, 12))
    with torch.inference_mode():
        expected = model(tokens)
        start = model(tokens[:, :7]).state
        state = model.state_from_tensors({name: tensor.clone() for name, tensor in start.tensors().items()})
        for t in range(7, 12):
            logits = model.decode_(tokens[:, t], state)
            assert torch.allclose(logits, expected.logits[:, t], atol=1e-10)
    for name, tensor in expected.state.tensors().items():
        assert torch.allclose(state.tensors()[name], tensor, atol=1e-10), name


def test_a_key_value_cache_grows_and_a_recurrent_state_does_not():
    grows = {
        name: LanguageModel.from_preset(f"{name}-tiny").state_grows for name in ("transformer", "moe-mamba")
    }
    assert grows == {"transformer": True, "moe-mamba": False}


def test_the_fused_step_renormalises_so_raw_weights_of_several_experts_take_the_ordinary_one(monkeypatch):
    monkeypatch.setattr(
        "switchmamba.layers.feed_forward.moe.fused_step_unavailable", lambda _device, _dtype: None
    )
    fused = {
        name: build_layer(name).eval()._has_fused_step()
        for name in ("moe-switch", "moe-top-2", "moe-top-2-raw")
    }
    assert fused == {"moe-switch": True, "moe-top-2": True, "moe-top-2-raw": False}
