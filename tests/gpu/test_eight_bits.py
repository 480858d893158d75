"""A model in eight bits is the same model on a GPU as on a CPU, in every form of computing."""

import copy

import pytest
import torch

from switchmamba.generation.decode_graph import DecodeGraph
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.quantization import quantize
from tests.generation.tiny_models import tiny_model, tiny_tokenizer
from tests.gpu.small import decoded, logits, relative

PRESETS = ("mamba-tiny", "moe-mamba-tiny", "mamba2-tiny", "transformer-moe-tiny")
presets = pytest.mark.parametrize("preset", PRESETS)


def pair(preset, device):
    """Return a model in eight bits on the CPU, and a copy of it on the device."""
    model = quantize(tiny_model(preset, torch.float32))
    return model, copy.deepcopy(model).to(device)


def text(rows, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(tiny_tokenizer().vocab_size, (rows, length), generator=generator)


@presets
def test_its_logits_are_those_of_a_cpu(preset, device):
    on_cpu, model = pair(preset, device)
    tokens = text(3, 40)
    expected = logits(on_cpu, tokens)
    assert relative(logits(model, tokens.to(device)), expected) < 1e-3
    assert relative(logits(tiny_model(preset, torch.float32), tokens), expected) > 2e-3  # eight bits show
    eight = [
        name for name, p in model.named_parameters() if p.dtype == torch.int8 and p.device.type == device.type
    ]
    assert any("head" in name for name in eight) and any("proj" in name for name in eight)


@presets
def test_step_by_step_equals_the_whole(preset, device):
    _, model = pair(preset, device)
    tokens = text(2, 9).to(device)
    whole = logits(model, tokens)
    with torch.inference_mode():
        output = model(tokens[:, :4])
        pieces = [output.logits]
        for t in range(4, 9):
            output = model(tokens[:, t : t + 1], state=output.state)
            pieces.append(output.logits)
    assert relative(torch.cat(pieces, 1), whole) < 1e-4
    if not model.state_grows:
        assert relative(decoded(model, tokens), whole[:, 1:]) < 1e-4


@presets
def test_it_draws_the_tokens_that_it_draws_on_a_cpu(preset, device):
    drawn = [[c.token_ids for c in _continued(model).completions] for model in pair(preset, device)]
    assert drawn[0] == drawn[1]
    assert any(len(row) > 16 for row in drawn[0])  # so many that a captured step has taken over


def _continued(model):
    greedy = SamplingSettings(temperature=0)
    return generate(model, tiny_tokenizer(), ["calm sea", "Bitte"], greedy, max_tokens=24).result


@pytest.mark.parametrize("preset", ["mamba-tiny", "mamba2-tiny"])
def test_without_experts_its_decoding_step_is_captured(preset, device):
    _, model = pair(preset, device)
    assert DecodeGraph.serves(model) is (device.type == "cuda")
    if device.type != "cuda":
        return
    tokens = text(2, 9).to(device)
    with torch.inference_mode():
        graph = DecodeGraph(model, model(tokens[:, :-1]).state)
    assert relative(graph.step(tokens[:, -1]), logits(model, tokens)[:, -1]) < 1e-3


def test_in_bf16_it_is_about_the_model_in_fp32(device):
    _, model = pair("mamba-tiny", device)
    tokens = text(3, 40).to(device)
    expected = logits(model, tokens)
    found = logits(model.bfloat16(), tokens)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 0.05
