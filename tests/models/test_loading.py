"""Saving and loading: the same model comes back, and what does not fit is refused by name."""

import json

import pytest
import torch

from switchmamba import LanguageModel, load
from switchmamba.checkpoint import write_directory
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError
from switchmamba.models.loading import model_files, save_model
from tests.layers.contract import PATTERNS, example_model, model_config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a few words to learn from, and a few more"] * 20, vocab_size=260)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_loaded_model_is_bit_equal_to_the_saved_one(tmp_path, name, tokenizer):
    torch.manual_seed(1)
    model = LanguageModel(example_model(name, vocab_size=260)).eval()
    save_model(tmp_path / "saved", model, tokenizer)
    loaded, loaded_tokenizer = load(tmp_path / "saved")
    assert loaded.config == model.config and not loaded.training
    assert loaded_tokenizer.sha256 == tokenizer.sha256
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for (name, before), (other, after) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other and after.requires_grad
        assert getattr(after, "_no_weight_decay", False) == getattr(before, "_no_weight_decay", False), name


def test_a_tied_head_stays_tied(tmp_path, tokenizer):
    model = LanguageModel(model_config(["mamba"], vocab_size=260, tie_embeddings=True))
    save_model(tmp_path / "saved", model, tokenizer)
    loaded = load(tmp_path / "saved").model
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 3}, "lacks layers.2"),
        ({"num_blocks": 1}, "holds layers.1"),
        ({"d_model": 28}, "the configuration says"),
        ({"d_modl": 24}, "did you mean d_model"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused_by_name(tmp_path, tokenizer, change, message):
    files = model_files(LanguageModel(model_config(["mamba"], vocab_size=260)), tokenizer, {})
    tables = json.loads(files["config.json"])
    tables["model"] |= change
    write_directory(tmp_path / "saved", files | {"config.json": json.dumps(tables).encode()}, {})
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "saved")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
