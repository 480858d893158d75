"""Device maps (with a CPU: weights on the disk that are loaded when needed), the pipeline, the tokenizer."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from switchmamba.data.tokenizer import Tokenizer
from switchmamba.interop.hugging_face import write_tokenizer
from switchmamba.layers.interface import SequenceInfo
from tests.hf.small import FAMILIES, model, tokens

TEXTS = ["the sea was calm and the ship lay still; nobody spoke. " * 4]
GREEDY = {"do_sample": False, "pad_token_id": 0}


def on_meta(loaded):
    return {name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_the_disk_are_loaded_when_they_are_needed(family, tmp_path):
    wrapped = model(family)
    wrapped.save_pretrained(tmp_path / "model")
    steps = wrapped.config.num_hidden_layers
    device_map = {"model.backbone.embedding": "cpu", "model.backbone.final_norm": "cpu", "lm_head": "disk"}
    device_map |= {f"model.backbone.layers.{i}": "cpu" if i == 0 else "disk" for i in range(steps)}
    if not wrapped.config.final_norm:
        del device_map["model.backbone.final_norm"]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    away = on_meta(loaded)
    assert away == {
        name
        for name in wrapped.state_dict()
        if name.startswith("lm_head") or (".layers.0." not in name and ".layers." in name)
    }
    with torch.no_grad():
        ours, theirs = (m(tokens(), output_router_logits=True) for m in (loaded, wrapped))
    assert torch.equal(ours.logits, theirs.logits)
    assert all(map(torch.equal, ours.router_logits, theirs.router_logits))
    expected = wrapped.generate(tokens(), max_new_tokens=5, **GREEDY)
    assert torch.equal(loaded.generate(tokens(), max_new_tokens=5, **GREEDY), expected)
    assert torch.equal(loaded.generate(tokens(), max_new_tokens=5, num_beams=2, **GREEDY),
                       wrapped.generate(tokens(), max_new_tokens=5, num_beams=2, **GREEDY))  # fmt: skip
    assert on_meta(loaded) == away


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_without_a_gpu_a_device_map_puts_everything_on_the_cpu(device_map, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    wrapped = model()
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(loaded(tokens()).logits, wrapped(tokens()).logits)


def test_a_map_by_memory_cuts_between_steps(tmp_path):
    wrapped = model("moe-mamba", num_blocks=2)
    wrapped.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.6 * wrapped.get_memory_footprint())},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} == set(map(str, loaded.hf_device_map.values()))
    assert all(name.count(".") <= 3 for name in loaded.hf_device_map)  # no step is cut
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, wrapped(tokens()).logits)


def test_what_a_step_is_given_moves_to_its_device():
    from accelerate.utils import send_to_device

    wrapped = model("hybrid")
    with torch.no_grad():
        out = wrapped.model(tokens())
    sequence = SequenceInfo(None, tokens() == 1, torch.zeros(2), torch.zeros(2))
    states = out.past_key_values.state.layers
    moved_sequence, moved_states, (stats,) = send_to_device((sequence, states, out.router_stats), "meta")
    moved = [*vars(moved_sequence).values(), *vars(stats).values()]
    moved += [tensor for state in moved_states if state is not None for tensor in vars(state).values()]
    tensors = [value for value in moved if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3 + 5 + 6
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [type(state) for state in moved_states] == [type(state) for state in states]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a model and its tokenizer."""
    words = Tokenizer.train(TEXTS, vocab_size=280)
    end = words.end_of_text_id
    model(
        "moe-mamba", vocab_size=words.vocab_size, pad_token_id=end, eos_token_id=end, bos_token_id=end
    ).save_pretrained(tmp_path)
    write_tokenizer(words, tmp_path)
    return tmp_path


def test_the_pipeline_generates_what_the_model_does(folder, caplog):
    generator = pipeline("text-generation", str(folder), device="cpu")
    words, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = ["the sea", "nobody"]
    answers = generator(texts, max_new_tokens=6, do_sample=False, batch_size=2, return_full_text=False)
    for text, (answer,) in zip(texts, answers, strict=True):
        prompt = words(text, return_tensors="pt")
        drawn = loaded.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert answer["generated_text"] == words.decode(drawn, skip_special_tokens=True)
    assert "not supported" not in caplog.text


def test_the_tokenizer_is_the_native_one(folder):
    words, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(folder / "tokenizer.json")
    assert words.eos_token == words.pad_token == "<|endoftext|>" and words.eos_token_id == ours.end_of_text_id
    assert words.padding_side == "left"
    for text in ("the ship lay still", " ä 🙂\n\tx", ""):
        assert words(text).input_ids == ours.encode(text)
        assert words.decode(ours.encode(text)) == text
    batch = words(["the sea", "calm"], padding=True, return_tensors="pt")
    assert batch.attention_mask[1, 0] == 0 and batch.attention_mask[:, -1].all()


def test_nothing_in_a_folder_is_code_or_a_pickle(folder):
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
