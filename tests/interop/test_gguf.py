"""GGUF files hold what llama.cpp's loader of Jamba asks for; whether it runs them is what ``make check-gguf`` shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from switchmamba.cli import main
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop.conversion import export_checkpoint
from switchmamba.interop.gguf_tokenizer import check_tokenizer
from tests.interop.foreign_models import tokenizer
from tests.interop.native_models import save, tiny
from tests.interop.test_jamba import MODELS
from tests.interop.test_mamba import MODELS as STACKS

gguf = pytest.importorskip("gguf")


def exported(
    tmp_path: Path, *overrides: tuple[str, Any], file_type: str = "f32"
) -> tuple[dict, dict, list[str]]:
    """Return keys, tensors and deviations of an exported model."""
    native = save(tmp_path / "native", tiny("jamba-compat-tiny", *overrides))
    done = export_checkpoint(native, "gguf", tmp_path / "gguf", {"file_type": file_type})
    assert done.agreement.relative < 2e-6
    reader = gguf.GGUFReader(tmp_path / "gguf" / f"model-{file_type}.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}, list(done.deviations)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "odd sizes"])
def test_every_kind_of_jamba_is_written_and_read_back_with_its_logits(tmp_path: Path, name: str) -> None:
    keys, tensors, _ = exported(tmp_path, *MODELS[name])
    heads = keys["jamba.attention.head_count_kv"]
    assert len(heads) == keys["jamba.block_count"]
    for i, kv_heads in enumerate(heads):
        assert (f"blk.{i}.ssm_a" in tensors) == (kv_heads == 0)
        assert (f"blk.{i}.attn_q.weight" in tensors) == (kv_heads > 0)
        assert (f"blk.{i}.ffn_gate_inp.weight" in tensors) != (f"blk.{i}.ffn_gate.weight" in tensors)


@pytest.mark.parametrize("file_type", ["f32", "q8_0"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_one_mamba_layer_are_written_and_read_back_with_their_logits(
    tmp_path: Path, name: str, file_type: str
) -> None:
    preset, overrides = STACKS[name]
    native = save(tmp_path / "native", tiny(preset, ("vocab_size", 320), *overrides))
    done = export_checkpoint(native, "gguf", tmp_path / "gguf", {"file_type": file_type})
    assert done.agreement.relative < 2e-6
    reader = gguf.GGUFReader(tmp_path / "gguf" / f"model-{file_type}.gguf")
    architecture = preset.removesuffix("-tiny")
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields[f"{architecture}.vocab_size"].contents() == 300
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    if architecture == "mamba2":
        groups = dict(overrides).get("layers.mamba2.num_groups", 1)
        assert shapes["blk.0.ssm_norm.weight"] == [64 // groups, groups]
        assert shapes["blk.0.ssm_a"] == shapes["blk.0.ssm_d"] == [1, shapes["blk.0.ssm_dt.bias"][0]]


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    keys, tensors, deviations = exported(tmp_path)
    expected = {
        "general.architecture": "jamba",
        "general.file_type": 0,
        "jamba.block_count": 3,
        "jamba.embedding_length": 32,
        "jamba.feed_forward_length": 64,
        "jamba.attention.head_count_kv": [0, 0, 1],
        "jamba.ssm.conv_kernel": 4,
        "jamba.ssm.inner_size": 64,
        "jamba.ssm.state_size": 16,
        "jamba.ssm.time_step_rank": 2,
        "jamba.expert_count": 4,
        "jamba.expert_used_count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer().end_of_text_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: keys[name] for name in expected} == expected
    assert keys["jamba.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert {str(tensor.tensor_type.name) for tensor in tensors.values()} == {"F32"}
    native = tiny()
    A_IN = -torch.exp(native.get_parameter("layers.0.mamba.A_log")).detach().numpy()
    assert np.allclose(tensors["blk.0.ssm_a"].data, A_IN, rtol=1e-6)
    w1_EFD = native.get_parameter("layers.1.moe.w1_EFD").detach().numpy()
    assert np.array_equal(tensors["blk.0.ffn_gate_exps.weight"].data, w1_EFD[:, :64])
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"].data, w1_EFD[:, 64:])
    assert list(tensors["blk.0.ffn_gate_exps.weight"].shape) == [32, 64, 4]
    assert not tensors["blk.2.attn_output.weight"].data.any()
    assert len(deviations) == 1
    assert "adds nothing, exactly" in deviations[0]


def test_tokens_types_and_merges_are_the_tokenizers(tmp_path: Path) -> None:
    keys, tensors, deviations = exported(tmp_path, ("vocab_size", 320))
    tables = json.loads(tokenizer().content)
    tokens = keys["tokenizer.ggml.tokens"]
    assert {token: i for i, token in enumerate(tokens)} == tables["model"]["vocab"] | {"<|endoftext|>": 0}
    types = keys["tokenizer.ggml.token_type"]
    assert types[0] == gguf.TokenType.CONTROL
    assert set(types[1:]) == {gguf.TokenType.NORMAL}
    assert [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]] == [
        tuple(pair) for pair in tables["model"]["merges"]
    ]
    assert list(tensors["output.weight"].shape) == [32, 300]
    assert "The last 20 rows of the vocabulary are no tokens and were left out." in deviations


@pytest.mark.parametrize(("file_type", "name"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_rounded_files_keep_what_decides_in_fp32(tmp_path: Path, file_type: str, name: str) -> None:
    keys, tensors, deviations = exported(tmp_path, file_type=file_type)
    kinds = {tensor.name.split(".", 2)[-1]: tensor.tensor_type.name for tensor in tensors.values()}
    for exact in (
        "ssm_a",
        "ssm_d",
        "ssm_conv1d.weight",
        "ffn_gate_inp.weight",
        "attn_norm.weight",
        "ssm_dt.bias",
    ):
        assert kinds[exact] == "F32", exact
    assert (
        kinds["ssm_in.weight"] == kinds["ffn_down_exps.weight"] == kinds["weight"] or kinds["weight"] == "F32"
    )
    assert (
        tensors["output.weight"].tensor_type.name == tensors["blk.0.ssm_in.weight"].tensor_type.name == name
    )
    assert kinds["ssm_dt.weight"] == ("F16" if file_type == "q8_0" else name)  # rows of 2 make no block of 32
    assert keys["general.file_type"] == getattr(gguf.LlamaFileType, f"MOSTLY_{name}")
    assert any(f"rounded to {file_type}" in sentence for sentence in deviations)


def test_a_file_whose_logits_differ_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchmamba.interop import gguf_layouts as module

    right = module._reshaped

    def without_exponential(*arguments: Any) -> Any:
        return {
            name: np.log(-array) if name.endswith("1.mamba.A_log") else array
            for name, array in right(*arguments).items()
        }

    monkeypatch.setattr(module, "_reshaped", without_exponential)
    native = save(tmp_path / "native", tiny())
    with pytest.raises(CheckpointError, match=r"the first to differ is what leaves layers\.2\.mamba"):
        export_checkpoint(native, "gguf", tmp_path / "gguf")
    assert [child.name for child in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize("file_type", ["f32", "q8_0"])
def test_a_wrong_translation_is_found_out_whatever_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_type: str
) -> None:
    from switchmamba.interop import gguf_layouts as module

    right = module.to_jamba

    def rolled(*arguments: Any) -> Any:
        return {
            name: tensor.roll(1, 0).contiguous() if name.endswith("1.feed_forward.router.weight") else tensor
            for name, tensor in right(*arguments).items()
        }

    monkeypatch.setattr(module, "to_jamba", rolled)
    native = save(tmp_path / "native", tiny())
    with pytest.raises(CheckpointError, match="the translation to jamba: is not the same model"):
        export_checkpoint(native, "gguf", tmp_path / "gguf", {"file_type": file_type})
    assert [child.name for child in tmp_path.iterdir()] == ["native"]


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    wide = save(tmp_path / "wide", tiny("jamba-compat-tiny", ("layers.mamba.expand", 3)))
    with pytest.raises(ConfigError, match=r"llama\.cpp runs such models with expand = 2 only"):
        export_checkpoint(wide, "gguf", tmp_path / "gguf")
    with pytest.raises(ConfigError, match="'q4' is none of f32, f16, bf16, q8_0"):
        export_checkpoint(wide, "gguf", tmp_path / "gguf", {"file_type": "q4"})
    paper = save(tmp_path / "paper", tiny("moe-mamba-tiny"))
    with pytest.raises(ConfigError, match="the model is no Jamba"):
        export_checkpoint(paper, "gguf", tmp_path / "gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            "plain ByteLevel",
        ),
        ({"pre_tokenizer": None}, "plain ByteLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(change: dict, message: str) -> None:
    tables = json.loads(tokenizer().content) | change
    other = object.__new__(Tokenizer)
    other.content = json.dumps(tables).encode()
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(other)


def test_the_command_takes_a_file_type_for_gguf_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, out = str(save(tmp_path / "native", tiny())), tmp_path / "out"
    assert main(["export", native, "--to", "jamba", "--file-type", "f16", "--out", str(out)]) == 2
    assert "has no meaning with --to jamba" in capsys.readouterr().err
    assert main(["export", native, "--to", "gguf", "--file-type", "q8_0", "--out", str(out)]) == 0
    assert sorted(child.name for child in out.iterdir()) == ["README.md", "model-q8_0.gguf"]
    assert "model-q8_0.gguf" in (out / "README.md").read_text()
