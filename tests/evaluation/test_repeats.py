"""Copying is measured where it happens: a copier scores 1 on what comes twice, a model without memory does not."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba.data.prepare import prepare
from switchmamba.errors import ConfigError, DataError, NonFiniteError
from switchmamba.evaluation.repeats import CLASSES, choose_spans, choose_windows, longest_repeats, repeats
from tests.generation.tiny_models import PRESETS, tiny_model, tiny_tokenizer

SMALL = {"gaps": (0, 5, 40), "span": 12, "prefix": 8, "skip": 3, "spans": 20, "context_length": 96}


def random_text(seed, length):
    """Text whose tokens are nearly independent: no n-gram of three comes twice by accident often."""
    generator = np.random.default_rng(seed)
    return bytes(generator.integers(33, 127, length).tolist()).decode()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("repeats") / "text.jsonl"
    texts = [random_text(i, length) for i, length in enumerate((400, 300, 60, 3, 250))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Model:
    """Stands in for a language model: logits (B, L, V) from a function of one row's tokens of one document."""

    causal = batch_invariant = True
    training = False
    device = torch.device("cpu")

    def __init__(self, predict):
        self.config = SimpleNamespace(vocab_size=tiny_tokenizer().vocab_size)
        self._predict = predict
        self.lengths = []

    def hidden_states(self, tokens_BL, document_ids_BL):
        hidden_BLV = torch.zeros(*tokens_BL.shape, self.config.vocab_size)
        for tokens, ids, hidden in zip(tokens_BL, document_ids_BL, hidden_BLV, strict=True):
            length = int((ids == 0).sum())
            self.lengths.append(length)
            hidden[:length] = self._predict(tokens[:length].tolist())
        return SimpleNamespace(hidden=hidden_BLV)

    @staticmethod
    def head(hidden):
        return hidden


def copier(tokens):
    """Predict what followed the longest suffix that occurred before, with certainty; uniform if none did."""
    logits = torch.zeros(len(tokens), tiny_tokenizer().vocab_size)
    for i in range(len(tokens)):
        best, follower = 0, None
        for j in range(i):
            length = 0
            while length <= j and tokens[j - length] == tokens[i - length]:
                length += 1
            if length >= max(best, 1):
                best, follower = length, tokens[j + 1]
        if follower is not None:
            logits[i, follower] = 30.0
    return logits


def memoryless(tokens):
    """The same prediction everywhere: "!" is a little more probable than all else."""
    logits = torch.zeros(len(tokens), tiny_tokenizer().vocab_size)
    logits[:, tiny_tokenizer().encode("!")[0]] = 1.0
    return logits


def test_a_perfect_copier_scores_1_on_the_second_occurrence_and_not_on_the_first(source):
    result = repeats(Model(copier), tiny_tokenizer(), source, **SMALL)
    assert [planted.gap for planted in result.planted] == [0, 5, 40]
    for planted in result.planted:
        assert planted.second.targets == planted.first.targets == 20 * 9
        assert planted.second.accuracy == 1
        assert planted.second.loss < 1e-9
        assert planted.second.accuracy_by_position[3:] == [1] * 9
        assert planted.second.accuracy_by_position[0] < 0.5  # nobody can know that a repeat begins
        assert planted.first.accuracy < 0.1


def test_a_model_without_memory_gains_nothing_from_a_repeat(source):
    result = repeats(Model(memoryless), tiny_tokenizer(), source, **SMALL)
    for planted in result.planted:
        assert planted.second == planted.first
        assert planted.first.accuracy < 0.1
    assert result.repeated is None
    assert result.elsewhere.targets == sum(ngram.targets for ngram in result.natural)


def test_natural_repeats_are_where_a_copier_is_right(tmp_path):
    passage = random_text(7, 50)
    (tmp_path / "text.txt").write_text(passage + random_text(8, 80) + passage)
    result = repeats(Model(copier), tiny_tokenizer(), tmp_path / "text.txt", context_length=300, gaps=())
    assert result.planted == []
    assert result.repeated.targets == 50 - 7
    assert result.repeated.accuracy == 1
    assert result.elsewhere.accuracy < 0.2
    assert result.natural[0].at_least == 0
    assert result.natural[0].accuracy == 0  # what is new cannot be copied
    assert result.tokens_read == result.repeated.targets + result.elsewhere.targets == 179


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=4))
def test_longest_repeats_equal_a_search_through_all_ngrams(rows):
    windows = [np.array(row, np.int64) for row in rows]
    for row, result in zip(rows, longest_repeats(windows), strict=True):
        expected = []
        for i in range(len(row)):
            lengths = [
                n
                for n in range(1, i + 1)
                if any(row[j - n + 1 : j + 1] == row[i - n + 1 : i + 1] for j in range(n - 1, i))
            ]
            expected.append(max(lengths, default=0))
        assert result.tolist() == expected


@given(
    st.lists(st.integers(0, 90), max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True).map(sorted),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(1, 8),
)
def test_spans_lie_in_their_documents_with_room_on_both_sides_and_do_not_overlap(
    lengths, gaps, span, prefix, count
):
    kept, places = choose_spans(lengths, gaps, span, prefix, count, seed=3)
    assert kept == [gap for gap in gaps if prefix + span + gap <= max(lengths, default=0)]
    room = sum(max(0, length - prefix - kept[-1]) // span for length in lengths) if kept else 0
    assert len(places) == min(count, room)
    covered = {(d, start + i) for d, start in places for i in range(span)}
    assert len(covered) == span * len(places)
    assert all(start >= prefix and start + span + kept[-1] <= lengths[d] for d, start in places)
    assert choose_spans(lengths, gaps, span, prefix, count, seed=3) == (kept, places)


def test_windows_cover_every_token_once_and_respect_the_limit():
    documents = [np.arange(length, dtype=np.uint16) + 1 for length in (25, 10, 7, 31)]
    windows = choose_windows(documents, 10, 10**6, seed=0)
    targets = sorted(token for window in windows for token in window[1:].tolist())
    assert targets == sorted(token for document in documents for token in document[1:].tolist())
    assert all(window[0] == window[1] - 1 for window in windows)
    some = choose_windows(documents, 10, 33, seed=0)
    assert [window.tolist() for window in some] == [window.tolist() for window in windows[: len(some)]]
    assert 23 < sum(len(window) - 1 for window in some) <= 33
    assert [len(window) for window in choose_windows(documents, 10, 3, seed=0)] == [4]


def test_the_definition_written_out_gives_the_same_numbers(source):
    """One planted sequence by itself, and one window, with a real model in fp64."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options = SMALL | {"gaps": (5,), "spans": 1, "max_tokens": 50}
    result = repeats(model, tokenizer, source, **options)
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    documents = [tokenizer.encode(text) for text in texts]
    _, ((d, start),) = choose_spans([len(ids) for ids in documents], [5], 12, 8, 1, seed=0)
    ids = documents[d]
    row = [*ids[start - 8 : start + 17], *ids[start : start + 12]]
    loss, right = one_by_one(model, row)
    (planted,) = result.planted
    for occurrence, at in ((planted.first, 7), (planted.second, 7 + 12 + 5)):
        assert occurrence.loss == pytest.approx(loss[at + 3 : at + 12].mean().item(), rel=1e-10)
        assert occurrence.accuracy == right[at + 3 : at + 12].mean().item()
        assert occurrence.loss_by_position == pytest.approx(loss[at : at + 12].tolist(), rel=1e-10)
    arrays = [np.array(ids) for ids in documents]
    (window,) = choose_windows(arrays, 96, 50, seed=0)
    loss, _ = one_by_one(model, window.tolist())
    total = sum(ngram.loss * ngram.targets for ngram in result.natural)
    assert total == pytest.approx(loss.sum().item(), rel=1e-10)


def one_by_one(model, row):
    with torch.no_grad():
        logits = model(torch.tensor([row[:-1]])).logits[0]
    targets = torch.tensor(row[1:])
    return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).double()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_batch_changes_nothing(preset, source):
    model, tokenizer = tiny_model(preset), tiny_tokenizer()
    expected = repeats(model, tokenizer, source, **SMALL, batch_size=1)
    result = repeats(model, tokenizer, source, **SMALL, batch_size=7)
    for ours, theirs in zip(result.planted, expected.planted, strict=True):
        assert ours.second.loss == pytest.approx(theirs.second.loss, rel=1e-10)
        assert ours.second.accuracy_by_position == theirs.second.accuracy_by_position
    for ours, theirs in zip(result.natural, expected.natural, strict=True):
        assert (ours.at_least, ours.targets) == (theirs.at_least, theirs.targets)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-10)


def test_the_same_seed_gives_the_same_spans_and_another_others(source):
    model, tokenizer = tiny_model("mamba-tiny"), tiny_tokenizer()
    first = repeats(model, tokenizer, source, **SMALL)
    assert repeats(model, tokenizer, source, **SMALL) == first
    assert repeats(model, tokenizer, source, **SMALL, seed=1).planted != first.planted


def test_autocast_of_the_caller_is_respected_and_scores_stay_in_single_precision(source):
    model, tokenizer = tiny_model("mamba-tiny", dtype=torch.float32), tiny_tokenizer()
    exact = repeats(model, tokenizer, source, **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = repeats(model, tokenizer, source, **SMALL)
    assert rough != exact
    assert rough.elsewhere.loss == pytest.approx(exact.elsewhere.loss, rel=2e-2)


def test_a_prepared_directory_gives_what_its_text_gives(source, tmp_path):
    model, tokenizer = tiny_model("mamba-tiny"), tiny_tokenizer()
    prepare([source], tokenizer, tmp_path / "data", validation_inputs=[source])
    assert repeats(model, tokenizer, tmp_path / "data", **SMALL) == repeats(model, tokenizer, source, **SMALL)


def test_classes_are_a_partition_and_their_means_make_up_the_whole(source):
    result = repeats(tiny_model("mamba-tiny"), tiny_tokenizer(), source, **SMALL)
    assert [ngram.at_least for ngram in result.natural] == [
        bound for bound in CLASSES if bound in {ngram.at_least for ngram in result.natural}
    ]
    assert all(math.isfinite(ngram.loss) and ngram.targets > 0 for ngram in result.natural)
    planted = 20 * sum(8 + 24 + gap - 1 for gap in (0, 5, 40))
    assert sum(ngram.targets for ngram in result.natural) == result.tokens_read - planted


def test_gaps_that_fit_neither_the_context_nor_a_document_are_left_out(source, tmp_path):
    model, tokenizer = Model(memoryless), tiny_tokenizer()
    result = repeats(model, tokenizer, source, **(SMALL | {"context_length": 37}))
    assert [planted.gap for planted in result.planted] == [0, 5]
    assert max(model.lengths) == 37  # of windows; a planted row needs no input for its last token
    (tmp_path / "short.txt").write_text("too short")
    assert repeats(model, tokenizer, tmp_path / "short.txt", **SMALL).planted == []


def test_progress_counts_every_token_read(source):
    seen = []
    result = repeats(
        Model(memoryless), tiny_tokenizer(), source, **SMALL, progress=lambda *numbers: seen.append(numbers)
    )
    assert seen[-1] == (result.tokens_read, result.tokens_read)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"span": 0}, "span = 0"),
        ({"skip": 12}, "skip = 12"),
        ({"prefix": 0}, "prefix = 0"),
        ({"gaps": (-1,)}, "gaps"),
        ({"spans": 0}, "spans = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"context_length": 0}, "context_length = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, part, source):
    with pytest.raises(ConfigError, match=part):
        repeats(Model(memoryless), tiny_tokenizer(), source, **(SMALL | options))


def test_a_model_that_looks_ahead_is_refused_unless_that_is_accepted(source):
    model = Model(memoryless)
    model.causal, model.why_not_causal = False, "experts choose"
    with pytest.raises(ConfigError, match="experts choose"):
        repeats(model, tiny_tokenizer(), source, **SMALL)
    assert repeats(model, tiny_tokenizer(), source, **SMALL, allow_non_causal=True).planted


def test_a_loss_that_is_no_number_is_an_error(source):
    with pytest.raises(NonFiniteError, match="no number"):
        repeats(Model(lambda tokens: memoryless(tokens) * math.nan), tiny_tokenizer(), source, **SMALL)


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        repeats(Model(memoryless), tiny_tokenizer(), tmp_path / "empty.jsonl", **SMALL)
