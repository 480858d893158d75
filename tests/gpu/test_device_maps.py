"""Models on other GPUs than the current one, and on two at once. With ``--device cpu``: on the CPU and on the disk."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from tests.generation.tiny_models import PRESETS, tiny_model, tiny_tokenizer
from tests.gpu.small import relative
from tests.hf.small import FAMILIES, model, tokens

pytestmark = pytest.mark.usefixtures("two_gpus")
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def places(device):
    """Name the two places that a model is cut over, as accelerate does."""
    return (0, 1) if device.type == "cuda" else ("cpu", "disk")


def assert_same(loaded, wrapped, device):
    text = tokens().to(device)
    with torch.no_grad():
        ours, theirs = (m(text, output_router_logits=True) for m in (loaded, wrapped))
    assert relative(ours.logits, theirs.logits) < 1e-5
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours.router_logits, theirs.router_logits, strict=True))
    for beams in (1, 2):
        found, expected = (
            m.generate(text, max_new_tokens=6, num_beams=beams, **GREEDY) for m in (loaded, wrapped)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_two_gpus_computes_what_it_does_on_one(family, tmp_path, device, places):
    wrapped = model(family)
    wrapped.save_pretrained(tmp_path / "model")
    steps = wrapped.config.num_hidden_layers
    device_map = {"model.backbone.embedding": places[0], "lm_head": places[1]}
    device_map |= {f"model.backbone.layers.{i}": places[2 * i >= steps] for i in range(steps)}
    if wrapped.config.final_norm:
        device_map["model.backbone.final_norm"] = places[1]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert len({parameter.device for parameter in loaded.parameters()}) == 2
    assert_same(loaded, wrapped.to(device), device)


def test_a_map_by_memory_cuts_between_steps(tmp_path, device, places):
    wrapped = model("moe-mamba", num_blocks=2)
    wrapped.save_pretrained(tmp_path / "model")
    size = wrapped.get_memory_footprint()
    memory = {places[0]: int(0.6 * size)} | ({places[1]: 4 * size} if device.type == "cuda" else {})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == set(places)
    assert all(name.count(".") <= 3 for name in loaded.hf_device_map)  # no step is cut
    assert_same(loaded, wrapped.to(device), device)


@pytest.mark.parametrize("preset", [*PRESETS, "mamba2-tiny"])
def test_a_gpu_that_is_not_the_current_one_draws_the_same_tokens(preset, device):
    second = torch.device("cuda", 1) if device.type == "cuda" else device
    text = torch.arange(18).view(2, 9)
    logits, drawn = [], []
    for place in (device, second):
        placed = tiny_model(preset, torch.float32).to(place)
        with torch.inference_mode():
            logits.append(placed(text.to(place)).logits)
        greedy = SamplingSettings(temperature=0)
        result = generate(placed, tiny_tokenizer(), ["calm sea", "Bitte"], greedy, max_tokens=24).result
        drawn.append([completion.token_ids for completion in result.completions])
    assert relative(*logits) < 1e-5
    assert drawn[0] == drawn[1]
