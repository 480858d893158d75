"""Two models that differ are found out, with the place where they part; nothing is left on disk."""

from pathlib import Path

import pytest
import torch

from switchmamba.cli import main
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop import FORMATS, guess_format, state_spaces
from switchmamba.interop.conversion import import_checkpoint
from switchmamba.interop.verification import Foreign, generated_tokens, residual_streams, verify
from switchmamba.models.language_model import LanguageModel
from tests.interop.foreign_models import mamba1_tensors, write_state_spaces


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_preset("moe-mamba-tiny").eval()


def foreign(native: LanguageModel) -> Foreign:
    return Foreign(lambda tokens: native(tokens).logits, lambda tokens: residual_streams(native, tokens))


def test_a_model_agrees_with_itself_exactly() -> None:
    native = model()
    agreement = verify(native, foreign(native), 1e-9, "itself")
    assert agreement.relative == agreement.largest == 0
    assert agreement.count == 256 * (1 + 2 * 33)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("embedding.weight", "what leaves the embedding"),
        ("layers.0.mamba.out_proj.weight", "what leaves layers.0.mamba"),
        ("layers.2.mamba.D", "what leaves layers.2.mamba"),
        (
            "layers.3.moe.w2_EDF",
            r"what leaves layers\.3\.moe \(if its router stands at a tie on these tokens, --seed draws",
        ),
        ("final_norm.weight", "all layers agree, so the final norm or the head differs"),
    ],
)
def test_the_first_layer_that_differs_is_named(name: str, place: str) -> None:
    native, other = model(), model()
    with torch.no_grad():
        other.get_parameter(name).add_(0.1)
    with pytest.raises(CheckpointError, match=place) as error:
        verify(native, foreign(other), 1e-5, "theirs")
    assert str(error.value).startswith("theirs: is not the same model: its logits differ by")


def test_a_difference_just_over_the_tolerance_is_refused_and_nan_is() -> None:
    native = model()
    nudged = Foreign(lambda tokens: native(tokens).logits * (1 + 2e-5))
    assert verify(native, nudged, 3e-5, "nudged").relative == pytest.approx(2e-5, rel=1e-2)
    with pytest.raises(CheckpointError, match="is not the same model"):
        verify(native, nudged, 1e-5, "nudged")
    with pytest.raises(CheckpointError, match="is not the same model"):
        verify(native, Foreign(lambda tokens: native(tokens).logits * torch.nan), 1e-5, "nan")
    with pytest.raises(CheckpointError, match="gives logits"):
        verify(native, Foreign(lambda tokens: native(tokens).logits[..., 1:]), 1e-5, "shorter")


def test_generated_tokens_are_always_the_same_and_inside_the_vocabulary() -> None:
    first, second = list(generated_tokens(7)), list(generated_tokens(7))
    assert all(torch.equal(a, b) and int(a.max()) < 7 for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], list(generated_tokens(7, seed=1))[1])


def test_another_seed_compares_on_other_tokens() -> None:
    native, other = model(), model()
    tokens = next(iter(generated_tokens(256)))
    with torch.no_grad():  # one token differs, as at a tie of a router
        other.embedding.weight[tokens[0, 0]] += 0.5
    with pytest.raises(CheckpointError, match="is not the same model"):
        verify(native, foreign(other), 1e-5, "theirs")
    unseen = next(
        s for s in range(1, 99) if not any((b == tokens[0, 0]).any() for b in generated_tokens(256, s))
    )
    assert verify(native, foreign(other), 1e-5, "theirs", seed=unseen).relative == 0


def test_an_import_whose_logits_differ_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_state_spaces(tmp_path / "theirs", mamba1_tensors(), {"d_state": 4})
    monkeypatch.setattr(state_spaces, "mamba1", lambda x, w, A: torch.zeros_like(x))
    with pytest.raises(
        CheckpointError, match=r"the first to differ is what leaves layers\.0\.mamba; nothing was"
    ):
        import_checkpoint(path, tmp_path / "ours")
    assert [child.name for child in tmp_path.iterdir()] == ["theirs"]


def test_formats_are_guessed_from_the_configuration() -> None:
    assert guess_format({"model_type": "jamba"}) == "jamba"
    assert guess_format({"d_model": 8, "n_layer": 2, "ssm_cfg": {}}) == "state-spaces"
    with pytest.raises(ConfigError, match="model_type = 'llama'"):
        guess_format({"model_type": "llama"})


@pytest.mark.parametrize("command", ["export", "import"])
def test_the_help_names_every_format(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for form in FORMATS.values():
        goes = form.imports if command == "import" else form.exports
        assert any(words[:1] == [form.name] and len(words) > 2 for words in lines) == goes, form.name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_functions_it_promises(name: str) -> None:
    form = FORMATS[name]
    pytest.importorskip({"hf": "transformers"}.get(form.extra or "", form.extra or "torch"))
    assert form.exports or form.imports
    assert not form.exports or callable(form.function("export"))
    assert not form.imports or callable(form.function("import_"))


def test_a_format_whose_package_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchmamba.extras.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"jamba needs transformers: pip install 'switchmamba\[hf\]'"):
        FORMATS["jamba"].function("export")
