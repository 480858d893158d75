import subprocess
import sys

import pytest
import torch

from switchmamba.checkpoint import write_directory
from switchmamba.errors import CheckpointError, SwitchMambaError
from switchmamba.generation.generate import generate
from switchmamba.generation.saved_state import TENSORS, fingerprint, load_state, save_state
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.loading import load, save_model
from tests.generation.tiny_models import PRESETS, tiny_model, tiny_tokenizer

SETTINGS = SamplingSettings(seed=11)


def read(model, prompt="The sea was", max_tokens=5):
    return generate(model, tiny_tokenizer(), [prompt], SETTINGS, max_tokens=max_tokens).result.completions[0]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "state"
    save_state(path, model, read(model).continuation)
    return path


def rewritten(path, model, tensors=None, **changes):
    """A state made with valid checksums and wrong contents."""
    extra = {"kind": "generation state", "model": fingerprint(model), "token": 5} | changes
    other = path.with_name("other")

    def write(file):
        from safetensors.torch import save_file

        save_file(tensors, file)

    files = {TENSORS: write if tensors is not None else (path / TENSORS).read_bytes()}
    write_directory(other, files, extra)
    return other


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("prompt", "first"), [("The sea was", 6), ("The sea was", 0), ("", 0), ("", 3)])
def test_going_on_from_a_saved_state_equals_never_having_stopped(preset, prompt, first, tmp_path):
    model = tiny_model(preset)
    whole = read(model, prompt, 16)
    start = read(model, prompt, first)
    save_state(tmp_path / "state", model, start.continuation)
    loaded = load_state(tmp_path / "state", model)
    rest = generate(model, tiny_tokenizer(), [""], max_tokens=16 - first, continuations=[loaded]).result
    assert start.token_ids + rest.completions[0].token_ids == whole.token_ids


def test_another_process_goes_on_as_if_nothing_had_happened(tmp_path):
    save_model(tmp_path / "checkpoint", tiny_model(dtype=torch.float32), tiny_tokenizer())
    model = load(tmp_path / "checkpoint").model
    start = read(model)
    save_state(tmp_path / "state", model, start.continuation)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from switchmamba import load\n"
        "from switchmamba.generation.generate import generate\n"
        "from switchmamba.generation.saved_state import load_state\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "state = load_state(Path(sys.argv[2]), model)\n"
        "result = generate(model, tokenizer, [''], max_tokens=10, continuations=[state]).result\n"
        "print(*result.completions[0].token_ids)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "checkpoint"), str(tmp_path / "state")]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert output.returncode == 0, output.stderr
    assert start.token_ids + tuple(map(int, output.stdout.split())) == read(model, max_tokens=15).token_ids


def test_token_ids_of_any_integer_type_can_be_saved(model, tmp_path):
    ids = tiny_tokenizer().encode_batch(["The sea"])[0]
    row = generate(model, tiny_tokenizer(), [ids], max_tokens=0).result.completions[0]
    save_state(tmp_path / "state", model, row.continuation)
    assert load_state(tmp_path / "state", model).token == ids[-1]


def test_a_state_is_never_overwritten(model, saved):
    with pytest.raises(CheckpointError, match="exists"):
        save_state(saved, model, read(model).continuation)


def test_the_state_of_another_model_is_refused(saved):
    for other in (tiny_model("mamba-tiny"), tiny_model(seed=1)):
        with pytest.raises(CheckpointError, match="another model"):
            load_state(saved, other)


def test_one_changed_weight_changes_the_fingerprint():
    model = tiny_model()
    before = fingerprint(model)
    assert fingerprint(tiny_model()) == before
    with torch.no_grad():
        model.head_weight[-1, -1] += 1e-9
    assert fingerprint(model) != before


@pytest.mark.parametrize("offset", [0, 100, -1])
def test_a_flipped_bit_is_refused_by_file_name(saved, model, offset):
    data = bytearray((saved / TENSORS).read_bytes())
    data[offset] ^= 1
    (saved / TENSORS).write_bytes(data)
    with pytest.raises(CheckpointError, match=TENSORS):
        load_state(saved, model)


def test_what_is_no_saved_state_is_refused(model, tmp_path):
    save_model(tmp_path / "checkpoint", model, tiny_tokenizer())
    with pytest.raises(CheckpointError, match="not a generation state"):
        load_state(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match="no such"):
        load_state(tmp_path / "nothing", model)


@pytest.mark.parametrize("token", [-1, 280, 5.0, True, None])
def test_a_token_outside_the_vocabulary_is_refused(saved, model, token):
    with pytest.raises(CheckpointError, match="token"):
        load_state(rewritten(saved, model, token=token), model)


@pytest.mark.parametrize("preset", ["moe-mamba-tiny", "transformer-tiny"])
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(preset, tmp_path):
    model = tiny_model(preset)
    path = tmp_path / "state"
    save_state(path, model, read(model).continuation)
    from safetensors.torch import load_file

    right = load_file(path / TENSORS)
    layer = next(name for name in right if name.startswith("layers.0."))
    wrong = {
        "missing": {name: tensor for name, tensor in right.items() if name != layer},
        "unknown": right | {"layers.9.h": torch.zeros(1)},
        "shorter": right | {layer: right[layer][..., :-1].contiguous()},
        "flat": right | {layer: right[layer].flatten()},
        "two rows": right | {layer: right[layer].repeat(2, *[1] * (right[layer].dim() - 1))},
        "halves": right | {layer: right[layer].half()},
        "no position": {name: tensor for name, tensor in right.items() if name != "position_B"},
        "generator": right | {"generator": torch.zeros(7, dtype=torch.uint8)},
        "no generator": {name: tensor for name, tensor in right.items() if name != "generator"},
    }
    for name, tensors in wrong.items():
        other = rewritten(path, model, tensors)
        with pytest.raises(CheckpointError, match=TENSORS):
            load_state(other, model)
        other.rename(tmp_path / name)


def test_caches_of_different_lengths_are_refused(tmp_path):
    model = tiny_model("transformer-tiny")
    path = tmp_path / "state"
    save_state(path, model, read(model).continuation)
    from safetensors.torch import load_file

    tensors = load_file(path / TENSORS)
    name = next(name for name in tensors if name.endswith("key_BHSP"))
    tensors[name] = tensors[name][:, :, :-1].contiguous()
    with pytest.raises(CheckpointError, match="different lengths"):
        load_state(rewritten(path, model, tensors), model)


def test_a_disk_that_cannot_be_written_leaves_nothing(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SwitchMambaError):
        save_state(blocked / "state", model, read(model).continuation)
    assert list(tmp_path.iterdir()) == [blocked]
