"""Checkpoints of state-spaces/mamba become native models with the same logits."""

from pathlib import Path

import pytest
import torch

from switchmamba import load
from switchmamba.cli import main
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop.conversion import import_checkpoint
from switchmamba.interop.verification import relative_difference
from tests.interop.foreign_models import (
    MAMBA2_SSM,
    mamba1_tensors,
    mamba2_tensors,
    write_state_spaces,
)

TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("binary", [False, True])
def test_a_mamba1_checkpoint_equals_hugging_faces_reading_of_it(tmp_path: Path, binary: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = mamba1_tensors()
    path = write_state_spaces(tmp_path / "theirs", tensors, {"d_state": 4}, binary=binary)
    assert import_checkpoint(path, tmp_path / "ours").relative < 1e-6
    config = transformers.MambaConfig(
        vocab_size=304,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.load_state_dict(
        {name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()}
    )
    model, _ = load(tmp_path / "ours")
    with torch.no_grad():
        assert relative_difference(model(TOKENS).logits, theirs(TOKENS).logits) < 1e-5


def test_a_mamba2_checkpoint_equals_hugging_faces_reading_of_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", minversion="5.23"
    )  # older norms take all groups together
    tensors = mamba2_tensors()
    path = write_state_spaces(tmp_path / "theirs", tensors, MAMBA2_SSM)
    assert import_checkpoint(path, tmp_path / "ours").relative < 1e-6
    config = transformers.Mamba2Config(
        vocab_size=304,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=5,
        head_dim=8,
        num_heads=4,
        n_groups=2,
        chunk_size=8,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.load_state_dict(
        {name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()}
    )
    model, _ = load(tmp_path / "ours")
    with torch.no_grad():
        assert relative_difference(model(TOKENS).logits, theirs(TOKENS).logits) < 1e-5


def test_a_mamba2_checkpoint_with_groups_equals_the_equations(tmp_path: Path) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba2_tensors(), MAMBA2_SSM, binary=True)
    assert import_checkpoint(path, tmp_path / "ours").relative < 1e-6


def test_without_a_bias_the_convolution_gets_one_of_zero(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in mamba1_tensors().items() if not name.endswith("conv1d.bias")}
    path = write_state_spaces(tmp_path / "theirs", tensors, {"d_state": 4, "conv_bias": False})
    assert import_checkpoint(path, tmp_path / "ours").relative < 1e-6
    assert not load(tmp_path / "ours").model.get_parameter("layers.0.mamba.conv1d.bias").any()


def test_an_untied_head_and_a_layer_norm_are_read(tmp_path: Path) -> None:
    tensors = mamba1_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    norms = [name for name in tensors if name.endswith((".norm.weight", "norm_f.weight"))]
    tensors |= {name.replace("weight", "bias"): torch.randn(16) for name in norms}
    path = write_state_spaces(
        tmp_path / "theirs", tensors, {"layer": "Mamba1", "d_state": 4}, rms_norm=False, tie_embeddings=False
    )
    assert import_checkpoint(path, tmp_path / "ours").relative < 1e-6


def test_the_command_imports_and_the_result_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), {"d_state": 4})
    assert main(["import", str(path), "--out", str(tmp_path / "ours")]) == 0
    assert "logits equal" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "ours"), "--prompt", "the cat", "--max-tokens", "4"]) == 0
    assert main(["info", str(tmp_path / "ours")]) == 0


@pytest.mark.parametrize(
    ("ssm_cfg", "config", "message"),
    [
        ({"d_state": 4, "bias": True}, {}, "ssm_cfg.bias = True: only False is supported"),
        ({"d_state": 4, "novel": 1}, {}, "ssm_cfg.novel = 1: the key is not supported"),
        ({"layer": "Mamba3"}, {}, "ssm_cfg.layer = 'Mamba3' is neither Mamba1 nor Mamba2"),
        ({"d_state": 4}, {"d_intermediate": 64}, "d_intermediate = 64"),
        ({"d_state": 4}, {"attn_layer_idx": [1]}, "attn_layer_idx = [1]"),
        ({"d_state": 4}, {"colour": "red"}, "colour = 'red' is unknown here"),
        ({"d_state": 4}, {"d_model": "wide"}, "d_model = 'wide' is no size"),
        ([4], {}, "ssm_cfg = [4] is no table"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, ssm_cfg: dict, config: dict, message: str
) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), ssm_cfg, **config)
    with pytest.raises(ConfigError, match="cannot be imported") as error:
        import_checkpoint(path, tmp_path / "ours")
    assert message in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_every_reason_is_named_at_once(tmp_path: Path) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), {"bias": True}, d_intermediate=64)
    with pytest.raises(ConfigError, match=r"d_intermediate = 64.*ssm_cfg\.bias"):
        import_checkpoint(path, tmp_path / "ours")


def test_missing_superfluous_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    whole = mamba1_tensors()
    lacking = {name: tensor for name, tensor in whole.items() if not name.endswith("1.mixer.D")}
    unbiased = {name: tensor for name, tensor in whole.items() if not name.endswith("1.mixer.conv1d.bias")}
    for name, tensors, message in (
        ("a", lacking, "lacks the tensor backbone.layers.1.mixer.D"),
        (
            "b",
            whole | {"backbone.extra": torch.ones(1)},
            "holds backbone.extra, which the model has no place for",
        ),
        ("c", whole | {"backbone.norm_f.weight": torch.ones(3)}, r"norm_f.weight is \(3,\)"),
        ("e", unbiased, "lacks the tensor backbone.layers.1.mixer.conv1d.bias"),
        (
            "f",
            whole | {"lm_head.weight": whole["lm_head.weight"].flip(0)},
            "lm_head.weight is not the embedding",
        ),
        ("d", whole | {"backbone.norm_f.weight": torch.full((16,), torch.nan)}, "NaN"),
    ):
        path = write_state_spaces(tmp_path / name, tensors, {"d_state": 4})
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path, tmp_path / "ours")


def test_a_bin_file_with_more_than_tensors_is_refused_unexecuted(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), {"d_state": 4}, binary=True)
    torch.save({"backbone.embedding.weight": Attack()}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        import_checkpoint(path, tmp_path / "ours")
    assert not (tmp_path / "executed").exists()


def test_without_a_tokenizer_the_error_says_where_it_comes_from(tmp_path: Path) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), {"d_state": 4})
    (path / "tokenizer.json").rename(tmp_path / "moved.json")
    with pytest.raises(CheckpointError, match="gpt-neox-20b"):
        import_checkpoint(path, tmp_path / "ours")
    import_checkpoint(path, tmp_path / "ours", tokenizer=tmp_path / "moved.json")
