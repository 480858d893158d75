"""Native stacks of Mamba layers and Hugging Face's MambaForCausalLM and Mamba2ForCausalLM."""

from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba import load
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop.conversion import export_checkpoint, import_checkpoint
from tests.interop.foreign_models import WORDS, tokenizer
from tests.interop.native_models import greedy, save, tiny

transformers = pytest.importorskip("transformers")

MODELS: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "mamba": ("mamba-tiny", []),
    "mamba, tied, other sizes": (
        "mamba-tiny",
        [
            ("tie_embeddings", True),
            ("layers.mamba.d_state", 5),
            ("layers.mamba.dt_rank", 3),
            ("norm_eps", 1e-6),
        ],
    ),
    "mamba2": ("mamba2-tiny", []),
    "mamba2, groups, tied": (
        "mamba2-tiny",
        [("tie_embeddings", True), ("layers.mamba2.num_groups", 2), ("layers.mamba2.head_dim", 8)],
    ),
}
GROUPS_APART = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
"""In transformers 5.17 the norm of Mamba-2 takes all groups together."""

CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
PROMPT = WORDS[:20]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_native_models_and_the_way_back_is_exact(tmp_path: Path, name: str) -> None:
    if "groups" in name and not GROUPS_APART:
        pytest.skip("the norm of this transformers takes all groups together")
    preset, overrides = MODELS[name]
    model = tiny(preset, *overrides)
    exported = export_checkpoint(save(tmp_path / "native", model), "mamba", tmp_path / "hf")
    assert exported.agreement.relative < 2e-6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == CLASSES[name.split(",")[0]]
    ids = tokenizer().encode(PROMPT)
    theirs_too = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert greedy(model, PROMPT, 24) == theirs_too

    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    back = load(tmp_path / "back").model
    for (name, parameter), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.skipif(not GROUPS_APART, reason="it does so by itself")
def test_a_transformers_that_computes_something_else_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    class AllGroupsTogether(modeling_mamba2.MambaRMSNormGated):
        """As in 5.17."""

        def __init__(self, hidden_size: int, **_: object) -> None:
            super().__init__(hidden_size, group_size=hidden_size, eps=1e-5)

    monkeypatch.setattr(modeling_mamba2, "MambaRMSNormGated", AllGroupsTogether)
    preset, overrides = MODELS["mamba2, groups, tied"]
    native = save(tmp_path / "native", tiny(preset, *overrides))
    with pytest.raises(CheckpointError, match=r"the first to differ is what leaves layers\.0\.mamba2"):
        export_checkpoint(native, "mamba", tmp_path / "hf")
    assert [child.name for child in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize(
    ("preset", "overrides", "reason"),
    [
        ("moe-mamba-tiny", [], "the pattern is mamba → moe"),
        ("mamba-tiny", [("layers.mamba.inner_norm_eps", 1e-5)], "theirs has no norms on Δ, B and C"),
        ("mamba-tiny", [("norm", "layernorm"), ("final_norm", False)], "model.norm = 'layernorm'"),
        ("mamba-tiny", [("layers.mamba.expand", "3/2")], "expand = 3/2, theirs is a whole number"),
        ("mamba2-tiny", [("norm_eps", 1e-6)], "norm_eps = 1e-06 and of the layer 1e-05"),
    ],
)
def test_what_is_no_mamba_of_theirs_is_refused(
    tmp_path: Path, preset: str, overrides: list[tuple[str, Any]], reason: str
) -> None:
    native = save(tmp_path / "native", tiny(preset, *overrides))
    with pytest.raises(ConfigError, match="--to hf exports every model") as error:
        export_checkpoint(native, "mamba", tmp_path / "hf")
    assert reason in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_limits_on_delta_and_biases_are_refused_at_import(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=304, hidden_size=16, num_hidden_layers=1, state_size=4, head_dim=8, num_heads=4, n_groups=1,
        time_step_limit=(0.0, 0.1), use_bias=True, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"use_bias = true.*time_step_limit = \[0\.0, 0\.1\]"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
