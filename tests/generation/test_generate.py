from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba import LanguageModel
from switchmamba.errors import ConfigError, NonFiniteError
from switchmamba.generation import generate as generate_module
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from tests.generation.tiny_models import (
    PRESETS,
    TEXTS,
    next_logits,
    relative_difference,
    tiny_model,
    tiny_tokenizer,
)

GREEDY = SamplingSettings(temperature=0)
EOT = 0
RECURRENT = ("mamba-tiny", "moe-mamba-tiny")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def script(monkeypatch, tokenizer):
    """Let rows draw given tokens instead of the model's: ``script("text", [3, 0])``, one per row."""

    def arrange(*rows: str | list[int]) -> list[list[int]]:
        scripts = [tokenizer.encode(row) if isinstance(row, str) else row for row in rows]
        streams: dict[int, Iterator[int]] = {}

        def choose(logits_BV, _settings, generators):
            assert len(logits_BV) == len(generators)
            if not streams:
                streams.update({id(g): iter(tokens) for g, tokens in zip(generators, scripts, strict=True)})
            return torch.tensor([next(streams[id(generator)]) for generator in generators])

        monkeypatch.setattr(generate_module, "choose", choose)
        return scripts

    return arrange


@pytest.fixture
def shapes(monkeypatch):
    """The (B, L) of every call of the model."""
    seen: list[tuple[int, ...]] = []
    original = LanguageModel.hidden_states

    def recording(self, tokens, *arguments, **named):
        seen.append(tuple(tokens.shape))
        return original(self, tokens, *arguments, **named)

    monkeypatch.setattr(LanguageModel, "hidden_states", recording)
    return seen


def completions(*arguments, **named):
    return generate(*arguments, **named).result.completions


# Reading prompts


@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_in_chunks_of_any_size_equals_one_forward_pass(preset, tokenizer):
    model = tiny_model(preset)
    prompt = tokenizer.encode(TEXTS[0])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    for chunk_size in (1, 2, 3, 7, len(prompt) - 1, 1000):
        (row,) = completions(model, tokenizer, [prompt], GREEDY, max_tokens=0, chunk_size=chunk_size)
        assert relative_difference(next_logits(model, row.continuation), expected) < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("chunk_size", [3, 1024])
def test_a_padded_batch_equals_its_rows_alone(preset, dtype, tolerance, chunk_size, tokenizer):
    model = tiny_model(preset, dtype)
    prompts = ["", "T", "The", TEXTS[0], TEXTS[2]]
    batch = completions(model, tokenizer, prompts, GREEDY, max_tokens=6, chunk_size=chunk_size)
    for prompt, together in zip(prompts, batch, strict=True):
        (alone,) = completions(model, tokenizer, [prompt], GREEDY, max_tokens=6)
        assert together.token_ids == alone.token_ids
        logits = next_logits(model, together.continuation)
        assert relative_difference(logits, next_logits(model, alone.continuation)) < tolerance


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_decoding_takes_the_maximum_of_the_full_forward_pass(preset, tokenizer):
    model = tiny_model(preset)
    tokens = tokenizer.encode(TEXTS[3])
    (row,) = completions(model, tokenizer, [TEXTS[3]], GREEDY, max_tokens=12)
    for expected in row.token_ids:
        with torch.no_grad():
            assert model(torch.tensor([tokens])).logits[0, -1].argmax() == expected
        tokens.append(expected)


def test_an_empty_prompt_begins_a_document(model, tokenizer):
    (empty,) = completions(model, tokenizer, [""], GREEDY, max_tokens=5)
    (begun,) = completions(model, tokenizer, [[EOT]], GREEDY, max_tokens=5)
    assert empty.token_ids == begun.token_ids


def test_what_is_computed_at_once_does_not_grow_with_the_prompt(model, tokenizer, shapes):
    prompts = [[5] * 1000, [6] * 40]
    result = generate(model, tokenizer, prompts, GREEDY, max_tokens=2, chunk_size=64).result
    assert max(length for _, length in shapes) == 64
    assert (result.prompt_tokens, result.decoded_tokens) == (1040, 2)


@pytest.mark.parametrize("preset", RECURRENT)
def test_the_state_of_a_sequence_does_not_grow(preset, tokenizer):
    model = tiny_model(preset)
    sizes = {
        completions(model, tokenizer, [[7] * length], GREEDY, max_tokens=0)[0].continuation.state.num_bytes
        for length in (10, 1000)
    }
    assert len(sizes) == 1


# Going on


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("first", [0, 1, 7])
def test_going_on_equals_never_having_stopped(preset, first, tokenizer):
    model = tiny_model(preset)
    settings = SamplingSettings(seed=3)
    for prompt in ("calm sea", ""):
        (whole,) = completions(model, tokenizer, [prompt], settings, max_tokens=20)
        (start,) = completions(model, tokenizer, [prompt], settings, max_tokens=first)
        for _ in range(2):  # a continuation is a value: it can be used twice
            (rest,) = completions(
                model, tokenizer, [""], max_tokens=20 - first, continuations=[start.continuation]
            )
            assert start.token_ids + rest.token_ids == whole.token_ids


@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_after_a_state_equals_one_prompt(preset, tokenizer):
    model = tiny_model(preset)
    first, second = tokenizer.encode(TEXTS[0]), tokenizer.encode(TEXTS[3])
    (read,) = completions(model, tokenizer, [first], GREEDY, max_tokens=0)
    (after,) = completions(
        model, tokenizer, [second], GREEDY, max_tokens=8, continuations=[read.continuation]
    )
    (whole,) = completions(model, tokenizer, [first + second], GREEDY, max_tokens=8)
    assert after.token_ids == whole.token_ids


def test_a_batch_can_go_on(model, tokenizer):
    prompts = ["The sea", "calm"]
    whole = completions(model, tokenizer, prompts, SamplingSettings(), max_tokens=9)
    start = completions(model, tokenizer, prompts, SamplingSettings(), max_tokens=4)
    rest = completions(
        model, tokenizer, ["", ""], max_tokens=5, continuations=[row.continuation for row in start]
    )
    assert [a.token_ids + b.token_ids for a, b in zip(start, rest, strict=True)] == [
        c.token_ids for c in whole
    ]


# Random numbers


def test_a_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    texts = [
        completions(model, tokenizer, ["The"], SamplingSettings(seed=seed), max_tokens=30)[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 4), st.lists(st.sampled_from(TEXTS), min_size=0, max_size=4))
def test_a_row_does_not_depend_on_its_batch_mates(position, others):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    position = min(position, len(others))
    prompts = [*others[:position], "The sea", *others[position:]]
    together = completions(model, tokenizer, prompts, SamplingSettings(seed=9), max_tokens=10)[position]
    (alone,) = completions(
        model, tokenizer, ["The sea"], SamplingSettings(seed=9), max_tokens=10, first_row=position
    )
    assert together.token_ids == alone.token_ids


def test_equal_prompts_of_a_batch_draw_different_texts(model, tokenizer):
    rows = completions(model, tokenizer, ["The"] * 4, SamplingSettings(), max_tokens=20)
    assert len({row.token_ids for row in rows}) == 4


# Ending


def test_the_end_of_text_ends_a_row_and_belongs_to_nobody(model, tokenizer, script):
    script([*tokenizer.encode("one"), EOT], "two and more")
    first, second = completions(model, tokenizer, ["a", "b"], max_tokens=4)
    assert (first.text, first.finish_reason, first.continuation.token) == ("one", "end_of_text", EOT)
    assert first.token_ids == tuple(tokenizer.encode("one"))
    assert second.finish_reason == "length"
    assert len(second.token_ids) == 4


def test_a_stop_text_across_tokens_ends_a_row(model, tokenizer, script):
    (tokens,) = script("calm sea, still ship")
    stop = "ea, st"
    assert not any(stop in tokenizer.decode([token]) for token in tokens)
    running = generate(model, tokenizer, ["a"], max_tokens=50, stop=[stop, "never"])
    pieces = [piece.text for piece in running]
    (row,) = running.result.completions
    assert (row.text, row.finish_reason) == ("calm s", "stop")
    assert "".join(pieces) == row.text
    assert tokenizer.decode(row.token_ids).startswith("calm sea, st")


def test_text_held_back_for_a_stop_text_comes_out_at_the_end(model, tokenizer, script):
    script("calm sea")
    (row,) = completions(
        model, tokenizer, ["a"], max_tokens=len(tokenizer.encode("calm sea")), stop=["sea, sea"]
    )
    assert (row.text, row.finish_reason) == ("calm sea", "length")


def test_pieces_are_whole_characters_and_make_up_the_text(model, tokenizer, script):
    scripts = script("für 3 € 🙂 und ein Käse", "𝄞 日本語 🙂🙂")
    length = max(map(len, scripts))
    scripts[0] += [EOT]
    scripts[1] += [EOT] * (length + 1 - len(scripts[1]))
    running = generate(model, tokenizer, ["a", "b"], max_tokens=length + 1)
    texts = ["", ""]
    for piece in running:
        assert piece.text and "\ufffd" not in piece.text
        texts[piece.row] += piece.text
    assert (
        texts == ["für 3 € 🙂 und ein Käse", "𝄞 日本語 🙂🙂"] == [c.text for c in running.result.completions]
    )


def test_a_character_cut_by_the_length_is_shown_as_unknown(model, tokenizer, script):
    (tokens,) = script("𝄞")
    (row,) = completions(model, tokenizer, ["a"], max_tokens=len(tokens) - 1)
    assert row.text == "\ufffd"


def test_finished_rows_leave_the_batch(model, tokenizer, script, shapes):
    script([9, 9, EOT], [9, 9, 9, 9, 9, EOT], [EOT])
    result = generate(model, tokenizer, ["The sea", "a", "ship"], max_tokens=8).result
    assert [length for _, length in shapes[1:]] == [1] * 6
    assert [batch for batch, _ in shapes[1:]] == [3, 2, 2, 1, 1, 1]
    assert [len(row.token_ids) for row in result.completions] == [2, 5, 0]
    assert result.decoded_tokens == 7


def test_rows_that_stay_are_not_disturbed_by_rows_that_leave(tokenizer):
    for preset in PRESETS:
        model = tiny_model(preset)
        prompts = ["The sea", "a", "ship", "calm"]
        free = completions(model, tokenizer, prompts, GREEDY, max_tokens=12)
        stop = next(
            text[i : i + 2]
            for text in [free[1].text]
            for i in range(len(text) - 1)
            if text[i : i + 2] not in free[2].text
        )
        stopped = completions(model, tokenizer, prompts, GREEDY, max_tokens=12, stop=[stop])
        assert stopped[1].finish_reason == "stop"
        assert stopped[2].token_ids == free[2].token_ids


def test_time_of_the_consumer_is_not_counted(model, tokenizer, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(generate_module, "perf_counter", lambda: next(clock))
    running = generate(model, tokenizer, ["The"], SamplingSettings(), max_tokens=5)
    for _ in running:
        for _ in range(1000):
            next(clock)
    # One tick per measurement: reading, the first token, and four more.
    assert (running.result.prompt_seconds, running.result.decode_seconds) == (2, 4)
    assert running.result.decode_tokens_per_second == 1


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"prompts": []}, "no prompt"),
        ({"stop": ("",)}, "stop"),
        ({"continuations": []}, "0 continuations for 1 prompts"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_computed(
    model, tokenizer, change, message, shapes
):
    with pytest.raises(ConfigError, match=message):
        generate(model, tokenizer, **({"prompts": ["a"]} | change))
    assert not shapes


def test_prompts_of_different_lengths_cannot_follow_states(model, tokenizer):
    rows = completions(model, tokenizer, ["a", "b"], GREEDY, max_tokens=1)
    with pytest.raises(ConfigError, match="equally many tokens"):
        generate(model, tokenizer, ["", "x"], continuations=[row.continuation for row in rows])


def test_a_model_in_training_mode_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        generate(tiny_model().train(), tokenizer, ["a"])


@pytest.mark.parametrize(
    ("promise", "flag"), [("causal", "allow_non_causal"), ("batch_invariant", "allow_batch_dependence")]
)
def test_a_model_that_breaks_a_promise_needs_a_flag(promise, flag, model, tokenizer, monkeypatch):
    monkeypatch.setattr(LanguageModel, promise, False)
    with pytest.raises(ConfigError, match=flag):
        generate(model, tokenizer, ["a"])
    assert generate(model, tokenizer, ["a"], max_tokens=1, **{flag: True}).result.completions


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tokenizer):
    model = LanguageModel.from_preset("mamba-tiny", vocab_size=tokenizer.vocab_size - 1).eval()
    with pytest.raises(ConfigError, match="280 entries, the model 279"):
        generate(model, tokenizer, ["a"])


def test_entries_beyond_the_tokenizer_are_never_drawn(tokenizer):
    model = LanguageModel.from_preset("mamba-tiny", vocab_size=1000 * tokenizer.vocab_size).eval()
    (row,) = completions(model, tokenizer, ["a"], max_tokens=20)
    assert max(row.token_ids) < tokenizer.vocab_size


def test_weights_that_give_nan_stop_generation(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="row 0"):
        completions(model, tokenizer, ["a"], max_tokens=3)
