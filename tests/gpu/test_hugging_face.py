"""Hugging Face's classes on a GPU: generation with the recurrent cache, and a Trainer in bf16."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer

from switchmamba.hf import SwitchMambaCache
from tests.hf.small import FAMILIES, model, relative, tokens
from tests.hf.test_training import STEPS, Counting, arguments, losses

families = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"do_sample": False, "pad_token_id": 0}


@families
def test_rows_of_different_lengths_generate_what_each_would_alone(family, device):
    wrapped, lengths = model(family).to(device), (2, 5, 9)
    texts = [tokens(1, length, seed=length).to(device) for length in lengths]
    alone = [wrapped.generate(text, max_new_tokens=6, **GREEDY)[:, -6:] for text in texts]
    padded = torch.cat([torch.nn.functional.pad(text, (9 - text.shape[1], 0), value=3) for text in texts])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths], device=device)
    together = wrapped.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert together.device.type == device.type
    assert torch.equal(together[:, -6:], torch.cat(alone))
    without_cache = wrapped.generate(padded, attention_mask=mask, max_new_tokens=6, use_cache=False, **GREEDY)
    assert torch.equal(without_cache, together)


@families
def test_the_cache_gives_the_logits_of_a_whole_pass_and_of_a_cpu(family, device):
    wrapped, text = model(family), tokens(2, 12)
    with torch.no_grad():
        expected = wrapped(text).logits
        wrapped, text = wrapped.to(device), text.to(device)
        whole = wrapped(text).logits
        cache, pieces = SwitchMambaCache(), []
        for piece in torch.split(text, [5, 1, 1, 4, 1], dim=1):
            pieces.append(wrapped(piece, past_key_values=cache).logits)
    assert relative(torch.cat(pieces, dim=1), whole) < 1e-4
    assert relative(whole.cpu(), expected) < 1e-3


def test_the_trainer_learns_in_bf16(tmp_path, device):
    settings = arguments(tmp_path, bf16=True, use_cpu=device.type == "cpu", save_strategy="no")
    assert settings.device.type == device.type
    settings._n_gpu = min(
        settings.n_gpu, 1
    )  # with several GPUs Trainer would copy the model to each (DataParallel)
    trainer = Trainer(model("moe-mamba"), settings, train_dataset=Counting())
    trainer.train()
    measured = losses(trainer)
    assert len(measured) == STEPS and measured[-1] < 0.6 * measured[0]
    assert {(p.dtype, p.device.type) for p in trainer.model.parameters()} == {(torch.float32, device.type)}
