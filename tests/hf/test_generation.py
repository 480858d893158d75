import copy
from itertools import product

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from switchmamba.errors import ConfigError
from switchmamba.hf import SwitchMambaCache, SwitchMambaForCausalLM
from tests.hf.small import FAMILIES, config, model, native, relative, tokens

families = pytest.mark.parametrize("family", list(FAMILIES))
GREEDY = {"do_sample": False, "pad_token_id": 0}


def greedily(wrapped, text, count):
    """Continue by whole forward passes of the native model, without any state."""
    twin = native(wrapped)
    for _ in range(count):
        text = torch.cat([text, twin(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text


@families
def test_greedy_text_is_that_of_the_native_model_without_a_state(family):
    wrapped = model(family)
    expected = greedily(wrapped, tokens(), 8)
    assert torch.equal(wrapped.generate(tokens(), max_new_tokens=8, **GREEDY), expected)
    assert torch.equal(wrapped.generate(tokens(), max_new_tokens=8, use_cache=False, **GREEDY), expected)


@families
def test_the_cache_gives_the_logits_of_a_whole_pass(family):
    wrapped, text = model(family), tokens(2, 12)
    whole = wrapped(text).logits
    cache, pieces = SwitchMambaCache(), []
    for piece in torch.split(text, [5, 1, 1, 4, 1], dim=1):
        pieces.append(wrapped(piece, past_key_values=cache).logits)
    assert relative(torch.cat(pieces, dim=1), whole) < 1e-5
    assert cache.get_seq_length() == 12 and cache.batch_size == 2


@families
def test_rows_of_different_lengths_generate_what_each_would_alone(family):
    wrapped = model(family)
    texts = [tokens(1, length, seed=length) for length in (2, 5, 9)]
    alone = [wrapped.generate(text, max_new_tokens=6, **GREEDY)[:, -6:] for text in texts]
    padded = torch.cat([torch.nn.functional.pad(text, (9 - text.shape[1], 0), value=3) for text in texts])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in (2, 5, 9)])
    together = wrapped.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(together[:, -6:], torch.cat(alone))

    beams = {"num_beams": 2, "max_new_tokens": 4, **GREEDY}
    best = torch.cat([wrapped.generate(text, **beams)[:, -4:] for text in texts])
    assert torch.equal(wrapped.generate(padded, attention_mask=mask, **beams)[:, -4:], best)

    first = wrapped.generate(
        padded, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True, **GREEDY
    )
    longer = torch.nn.functional.pad(mask, (0, 2), value=1)
    rest = wrapped.generate(
        first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **GREEDY,
    )
    assert torch.equal(rest, together)


def test_generation_goes_on_from_a_cache_by_either_name_and_in_pieces():
    wrapped = model("hybrid")
    whole = wrapped.generate(tokens(), max_new_tokens=6, **GREEDY)
    for name in ("past_key_values", "cache_params"):
        first = wrapped.generate(tokens(), max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        rest = wrapped.generate(first.sequences, max_new_tokens=3, **{name: first.past_key_values}, **GREEDY)
        assert torch.equal(rest, whole)
    assert torch.equal(wrapped.generate(tokens(), max_new_tokens=6, prefill_chunk_size=4, **GREEDY), whole)


def test_a_prompt_read_once_is_continued_in_several_ways():
    wrapped, prompt = model("hybrid"), tokens(1, 6)
    cache = wrapped(prompt).past_key_values
    for seed in (2, 3):
        longer = torch.cat([prompt, tokens(1, 3, seed=seed)], dim=1)
        expected = wrapped.generate(longer, max_new_tokens=4, **GREEDY)
        drawn = wrapped.generate(longer, past_key_values=copy.deepcopy(cache), max_new_tokens=4, **GREEDY)
        assert torch.equal(drawn, expected)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("family", ["moe-mamba", "hybrid"])
def test_beam_search_finds_the_best_of_all_sequences_when_the_beam_holds_them(family):
    wrapped = model(family, vocab_size=5)
    text = tokens(2, 4) % 4 + 1  # no 0, which would be taken for padding
    beams = wrapped.generate(
        text, num_beams=25, max_new_tokens=3, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        **GREEDY,
    )  # fmt: skip
    for row in range(2):
        every = torch.tensor(list(product(range(5), repeat=3)))
        candidates = torch.cat([text[row].expand(len(every), -1), every], dim=1)
        log_p = native(wrapped)(candidates).logits[:, 3:-1].log_softmax(-1)
        score = log_p.gather(2, every[..., None]).sum((1, 2))
        assert torch.equal(beams.sequences[row], candidates[score.argmax()])
        assert torch.allclose(beams.sequences_scores[row], score.max(), atol=1e-5)


def test_beam_search_gives_the_same_with_and_without_the_cache():
    wrapped = model("hybrid")
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, **GREEDY}
    assert torch.equal(
        wrapped.generate(tokens(), **kwargs), wrapped.generate(tokens(), use_cache=False, **kwargs)
    )


def test_sampling_draws_from_the_model_s_distribution():
    wrapped, rows = model("moe-mamba", vocab_size=5), 4000
    text = (tokens(1, 4) % 4 + 1).expand(rows, -1)
    torch.manual_seed(0)
    drawn = wrapped.generate(text, do_sample=True, top_k=0, max_new_tokens=2, pad_token_id=0)[:, -2:]
    first = native(wrapped)(text[:1]).logits[0, -1].softmax(-1)
    frequency = torch.bincount(drawn[:, 0], minlength=5) / rows
    assert torch.allclose(frequency, first, atol=0.03)
    again = wrapped.generate(text[:1].expand(3, -1), do_sample=True, max_new_tokens=4, pad_token_id=0)
    torch.manual_seed(0)
    a = wrapped.generate(text[:8], do_sample=True, max_new_tokens=4, pad_token_id=0)
    torch.manual_seed(0)
    assert torch.equal(a, wrapped.generate(text[:8], do_sample=True, max_new_tokens=4, pad_token_id=0))
    assert again.shape == (3, 8)


@families
@pytest.mark.parametrize("helper", ["itself", "another", "prompt lookup"])
def test_assisted_text_is_that_without_assistance(family, helper):
    wrapped = model(family)
    text = tokens(1, 6).repeat(1, 3)
    expected = wrapped.generate(text, max_new_tokens=14, **GREEDY)
    if helper == "prompt lookup":
        kwargs = {"prompt_lookup_num_tokens": 3}
    else:
        kwargs = {"assistant_model": wrapped if helper == "itself" else model(family, seed=5)}
    assert torch.equal(wrapped.generate(text, max_new_tokens=14, **kwargs, **GREEDY), expected)


@families
def test_a_recording_cache_forgets_what_is_cropped_and_an_ordinary_one_refuses(family):
    wrapped, text = model(family), tokens(2, 12)
    whole = wrapped(text).logits
    cache = SwitchMambaCache()
    cache.activate_past_recording()
    wrong = tokens(2, 12, seed=9)
    wrapped(torch.cat([text[:, :6], wrong[:, :2]], dim=1), past_key_values=cache)
    cache.crop(-2)
    wrapped(text[:, 6:8], past_key_values=cache)
    wrapped(wrong[:, :1], past_key_values=cache)
    wrapped(wrong[:, 1:2], past_key_values=cache)
    cache.crop(-3)  # over three calls, into the right one
    assert cache.get_seq_length() == 7
    out = wrapped(text[:, 7:], past_key_values=cache)
    assert relative(out.logits, whole[:, 7:]) < 1e-5
    cache.crop(0)
    with pytest.raises(RuntimeError, match="1 tokens to remove were not recorded"):
        cache.crop(-1)
    ordinary = wrapped(text).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        ordinary.crop(-1)


def test_the_cache_can_be_looked_at():
    cache = model("hybrid")(tokens()).past_key_values
    recurrent, attention, nothing = cache.layers
    assert len(cache) == 3
    assert recurrent.recurrent_states[0].shape == (2, 64, 16) and recurrent.conv_states[0].shape == (2, 64, 3)
    assert attention.keys.shape == attention.values.shape == (2, 2, 9, 16)
    assert getattr(nothing, "keys", None) is None and getattr(nothing, "conv_states", {}).get(0) is None
    for change in (cache.update, cache.update_conv_state, cache.update_recurrent_state):
        with pytest.raises(TypeError, match="which only that model advances"):
            change(torch.zeros(1), 0)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.reset()
    assert cache.get_seq_length() == 0 and len(cache) == 0


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_outputs_of_generation_are_complete():
    wrapped = model("moe-mamba")
    out = wrapped.generate(
        tokens(), generation_config=GenerationConfig(max_new_tokens=3, output_hidden_states=True, output_scores=True,
        output_logits=True, return_dict_in_generate=True, **GREEDY), stopping_criteria=StoppingCriteriaList([_Never()])
    )  # fmt: skip
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 3
    assert [states[0].shape for states in out.hidden_states] == [(2, 9, 32), (2, 1, 32), (2, 1, 32)]
    assert all(len(states) == wrapped.config.num_hidden_layers + 1 for states in out.hidden_states)
    assert out.past_key_values.get_seq_length() == 11


def test_generation_begins_at_the_configured_token_and_ends_at_another():
    wrapped = model("moe-mamba", bos_token_id=2, pad_token_id=0)
    out = wrapped.generate(max_new_tokens=5, do_sample=False)
    assert torch.equal(out, greedily(wrapped, torch.tensor([[2]]), 5))
    end = int(out[0, 3])
    stopped = wrapped.generate(max_new_tokens=5, do_sample=False, eos_token_id=end)
    assert stopped[0].tolist() == out[0, : out[0].tolist().index(end) + 1].tolist()


@pytest.mark.parametrize("implementation", ["static", "offloaded_static", "offloaded", "quantized"])
def test_other_caches_are_refused(implementation):
    with pytest.raises(ConfigError, match=f"cache_implementation='{implementation}' is not for this model"):
        model().generate(tokens(), max_new_tokens=2, cache_implementation=implementation, **GREEDY)


def test_continuous_batching_is_refused():
    for call in (
        lambda: model().generate(tokens(), cache_implementation="paged"),
        lambda: model().generate_batch([[1, 2]]),
    ):
        with pytest.raises(ConfigError, match="continuous batching"):
            call()


@families
def test_prompts_padded_on_the_right_generate_what_each_would_alone(family):
    wrapped = model(family)
    texts = [tokens(1, length, seed=length) for length in (2, 5, 9)]
    alone = [wrapped.generate(text, max_new_tokens=6, **GREEDY)[:, -6:] for text in texts]
    padded = torch.cat([torch.nn.functional.pad(text, (0, 9 - text.shape[1]), value=3) for text in texts])
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in (2, 5, 9)])
    for use_cache in (True, False):
        together = wrapped.generate(
            padded, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **GREEDY
        )
        assert torch.equal(together[:, -6:], torch.cat(alone)), use_cache
    assisted = wrapped.generate(
        padded[1:2], attention_mask=mask[1:2], prompt_lookup_num_tokens=2, max_new_tokens=6, **GREEDY
    )
    assert torch.equal(assisted[:, -6:], alone[1])


def test_padding_behind_text_that_a_cache_has_read_is_refused():
    wrapped = model()
    cache = wrapped(tokens()).past_key_values
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 10] = 0
    for columns in (slice(9, 11), slice(9, 12)):  # at the end, and in the middle
        with pytest.raises(ConfigError, match="padding in a row that has read text"):
            wrapped(tokens(2, 12)[:, columns], past_key_values=cache, attention_mask=mask[:, : columns.stop])


@pytest.mark.parametrize("router", [{"kind": "expert_choice"}, {"kind": "soft"}])
def test_a_model_that_looks_ahead_generates_only_when_told_to(router):
    wrapped = SwitchMambaForCausalLM(config("moe-mamba", layers__moe__router=router)).eval()
    with pytest.raises(ConfigError, match=r"not causal \(layers\.1\.moe: it routes by"):
        wrapped.generate(tokens(), max_new_tokens=2, **GREEDY)
    with pytest.raises(ConfigError, match="not causal"):
        wrapped(tokens(), past_key_values=wrapped(tokens()).past_key_values)
    out = wrapped.generate(tokens(), max_new_tokens=2, allow_non_causal=True, **GREEDY)
    assert out.shape == (2, 11)


def test_a_model_that_would_drop_tokens_does_not_generate():
    wrapped = model("moe-mamba", layers__moe__capacity_factor=1.0).train()
    with pytest.raises(ConfigError, match=r"training mode, where experts drop tokens; call model\.eval"):
        wrapped.generate(tokens(), max_new_tokens=2, **GREEDY)
    assert model("moe-mamba").train().generate(tokens(), max_new_tokens=2, **GREEDY).shape == (2, 11)
