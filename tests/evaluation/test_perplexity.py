import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba import LanguageModel
from switchmamba.data.prepare import prepare
from switchmamba.data.shards import TokenShards
from switchmamba.data.synthetic import SelectiveCopying, prepare_synthetic
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError, DataError, NonFiniteError
from switchmamba.evaluation import perplexity
from switchmamba.evaluation.documents import TokenisedDocument, open_documents
from switchmamba.evaluation.perplexity import Evaluation, evaluate
from tests.generation.tiny_models import PRESETS, TEXTS, tiny_model, tiny_tokenizer, to_dtype

DOCUMENTS = [*TEXTS, "a", "🙂", TEXTS[0] * 3, "short one", TEXTS[1] + TEXTS[2], "z" * 90]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write(tmp_path_factory.mktemp("text") / "text.jsonl", DOCUMENTS)


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def one_by_one(model, tokenizer, texts):
    """The definition: every document by itself, in one forward pass."""
    losses, right, num_bytes = [], 0, 0
    for text in texts:
        targets = torch.tensor([*tokenizer.encode(text), tokenizer.end_of_text_id])
        tokens = torch.tensor([tokenizer.end_of_text_id, *tokenizer.encode(text)])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        right += int((logits.argmax(-1) == targets).sum())
        num_bytes += len(text.encode())
    loss = torch.cat(losses)
    mean = loss.mean().item()
    return Evaluation(
        loss=mean,
        perplexity=math.exp(mean),
        bits_per_byte=loss.sum().item() / math.log(2) / num_bytes,
        accuracy=right / len(loss),
        tokens=len(loss),
        bytes=num_bytes,
        documents=len(texts),
    )


def assert_equal(result, expected, tolerance=1e-10):
    for name, value in vars(expected).items():
        exact = not isinstance(value, float)
        assert getattr(result, name) == (value if exact else pytest.approx(value, rel=tolerance)), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1024), (3, 16), (8, 50), (2, 4), (64, 7)])
def test_evaluation_equals_every_document_by_itself(preset, batch_size, chunk_size, tokenizer, text):
    model = tiny_model(preset)
    result = evaluate(model, tokenizer, text, batch_size=batch_size, chunk_size=chunk_size)
    assert_equal(result, one_by_one(model, tokenizer, DOCUMENTS))


def test_single_precision_agrees_too(tokenizer, text):
    model = tiny_model(dtype=torch.float32)
    expected = one_by_one(model, tokenizer, DOCUMENTS)
    for batch_size, chunk_size in ((1, 1024), (3, 16)):
        result = evaluate(model, tokenizer, text, batch_size=batch_size, chunk_size=chunk_size)
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_any_documents_in_any_batches(tmp_path_factory, texts, batch_size, chunk_size):
    model, tokenizer = tiny_model("mamba-tiny"), tiny_tokenizer()
    path = write(tmp_path_factory.mktemp("any") / "any.jsonl", texts)
    result = evaluate(model, tokenizer, path, batch_size=batch_size, chunk_size=chunk_size)
    assert_equal(result, one_by_one(model, tokenizer, texts))


def test_logits_are_formed_a_slice_at_a_time_without_changing_the_result(model, tokenizer, text, monkeypatch):
    expected = evaluate(model, tokenizer, text)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 5 * tokenizer.vocab_size)
    rows = []
    original = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda hidden: rows.append(len(hidden)) or original(hidden))
    assert_equal(evaluate(model, tokenizer, text), expected)
    assert max(rows) == 5
    assert sum(rows) == expected.tokens


def test_a_long_document_is_computed_in_chunks_and_finished_rows_leave(
    model, tokenizer, tmp_path, monkeypatch
):
    path = write(tmp_path / "long.jsonl", ["q" * 5000, "q" * 1000, "x"])
    shapes = []
    original = LanguageModel.hidden_states

    def recording(self, tokens, *arguments, **named):
        shapes.append(tuple(tokens.shape))
        return original(self, tokens, *arguments, **named)

    monkeypatch.setattr(LanguageModel, "hidden_states", recording)
    result = evaluate(model, tokenizer, path, chunk_size=512, batch_size=2)
    assert result.tokens == 5001 + 1001 + 2
    assert shapes == [(2, 512)] * 2 + [(1, 512)] * 7 + [(1, 5001 - 9 * 512), (1, 2)]


def test_a_prepared_directory_gives_what_its_text_gives(model, tokenizer, tmp_path, text):
    held_out = write(tmp_path / "held_out.jsonl", DOCUMENTS[:4])
    prepare([text], tokenizer, tmp_path / "data", validation_inputs=[held_out])
    assert_equal(
        evaluate(model, tokenizer, tmp_path / "data"),
        one_by_one(model, tokenizer, DOCUMENTS[:4]),
        tolerance=1e-12,
    )
    train = evaluate(model, tokenizer, tmp_path / "data", split="train")
    assert_equal(train, evaluate(model, tokenizer, text), tolerance=1e-12)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    assert train.bytes == index["splits"]["train"]["text_bytes"]


@pytest.mark.parametrize("max_tokens", [1, 30, 77, 10**9])
def test_max_tokens_stops_within_a_document(max_tokens, model, tokenizer, text):
    result = evaluate(model, tokenizer, text, max_tokens=max_tokens)
    lengths = [len(tokenizer.encode(document)) + 1 for document in DOCUMENTS]
    assert result.tokens == min(max_tokens, sum(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert result.documents == sum(start < max_tokens for start in starts)
    spelled = 0
    for start, document in zip(starts, DOCUMENTS, strict=True):
        tokens = tokenizer.encode(document)[: max(0, max_tokens - start)]
        spelled += sum(len(tokenizer.token_bytes(token)) for token in tokens)
    assert result.bytes == spelled


@pytest.mark.parametrize("preset", ["moe-mamba-tiny", "transformer-tiny"])
def test_with_a_context_length_every_piece_is_predicted_from_itself(preset, tokenizer, text):
    model, length = tiny_model(preset), 7
    ids = [[tokenizer.end_of_text_id, *tokenizer.encode(t), tokenizer.end_of_text_id] for t in DOCUMENTS]
    pieces = [d[start : start + length + 1] for d in ids for start in range(0, len(d) - 1, length)]
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(torch.tensor([p[:-1]])).logits[0], torch.tensor(p[1:]), reduction="none")
            for p in pieces
        ]
    found = evaluate(model, tokenizer, text, context_length=length, chunk_size=5)
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert (found.tokens, found.context_length) == (sum(len(p) - 1 for p in pieces), length)
    assert found.loss != pytest.approx(evaluate(model, tokenizer, text).loss, rel=1e-5)


def test_text_comes_from_the_named_field_and_from_globs(model, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["one"], field="body")
    write(tmp_path / "b.jsonl", ["two two"], field="body")
    result = evaluate(model, tokenizer, str(tmp_path / "*.jsonl"), field="body")
    assert_equal(result, one_by_one(model, tokenizer, ["one", "two two"]))


def test_progress_counts_the_targets(model, tokenizer, tmp_path, text):
    seen = []
    result = evaluate(
        model, tokenizer, text, chunk_size=16, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (result.tokens, None)
    prepare([text], tokenizer, tmp_path / "data", validation_inputs=[text])
    evaluate(model, tokenizer, tmp_path / "data", max_tokens=50, progress=lambda *pair: seen.append(pair))
    assert seen[-1] == (50, 50)


def test_another_tokenizers_shards_are_refused(model, tokenizer, tmp_path, text):
    other = Tokenizer.train(["quite different words"], vocab_size=270)
    prepare([text], other, tmp_path / "data", validation_inputs=[text])
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate(model, tokenizer, tmp_path / "data")


def test_damaged_shards_are_refused_by_name(model, tokenizer, tmp_path, text):
    prepare([text], tokenizer, tmp_path / "data", validation_inputs=[text])
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    shard = tmp_path / "data" / index["splits"]["validation"]["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=shard.name):
        evaluate(model, tokenizer, tmp_path / "data")


def test_missing_and_empty_text_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="nothing"):
        evaluate(model, tokenizer, tmp_path / "nothing.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        evaluate(model, tokenizer, tmp_path / "empty.jsonl")


@pytest.mark.parametrize("name", ["max_tokens", "batch_size", "chunk_size"])
def test_sizes_below_one_are_refused(name, model, tokenizer, text):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        evaluate(model, tokenizer, text, **{name: 0})


def test_a_model_in_training_mode_is_refused(tokenizer, text):
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        evaluate(tiny_model().train(), tokenizer, text)


@pytest.mark.parametrize(
    ("promise", "flag"), [("causal", "allow_non_causal"), ("batch_invariant", "allow_batch_dependence")]
)
def test_a_model_that_breaks_a_promise_needs_a_flag(promise, flag, model, tokenizer, text, monkeypatch):
    monkeypatch.setattr(LanguageModel, promise, False)
    with pytest.raises(ConfigError, match=flag):
        evaluate(model, tokenizer, text)
    assert evaluate(model, tokenizer, text, max_tokens=1, **{flag: True}).tokens == 1


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tokenizer, text):
    model = LanguageModel.from_preset("mamba-tiny", vocab_size=tokenizer.vocab_size - 1).eval()
    with pytest.raises(ConfigError, match="280 entries, the model 279"):
        evaluate(model, tokenizer, text)


def test_a_loss_that_is_no_number_raises(tokenizer, text):
    model = tiny_model()
    with torch.no_grad():
        model.head_weight[7] = torch.nan
    with pytest.raises(NonFiniteError, match="nan"):
        evaluate(model, tokenizer, text)


def test_a_loss_whose_perplexity_overflows_raises(tokenizer, text):
    model = tiny_model()
    with torch.no_grad():
        model.head_weight.mul_(1e6)
    with pytest.raises(NonFiniteError, match="the loss is"):
        evaluate(model, tokenizer, text)


def test_documents_can_be_opened_before_a_model_is_loaded(tokenizer, text):
    documents = open_documents(text)
    assert documents.num_tokens is None
    assert [tokenizer.decode(d.ids[:-1]) for d in documents.tokenised(tokenizer)] == DOCUMENTS


# Masks


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    """Examples of ten tokens with two to answer."""
    out = tmp_path_factory.mktemp("copying") / "data"
    prepare_synthetic(
        SelectiveCopying(length=6, data_tokens=2, vocabulary=4), out, train_examples=0, validation_examples=60
    )
    return out


def masked_one_by_one(model, tokenizer, directory, max_tokens=10**9):
    """The definition: every document by itself, and only what its mask counts."""
    shards = TokenShards.open(directory, "validation")
    losses, right_answers, right, num_bytes, documents, answers = [], 0, [], 0, 0, 0
    for i in range(shards.num_documents):
        ids = torch.tensor(shards.document(i).astype(int))[:max_tokens]
        mask = torch.tensor(shards.mask(i).astype(bool))[:max_tokens]
        max_tokens -= len(ids)
        if not len(ids):
            break
        documents += 1
        with torch.no_grad():
            logits = model(ids[None]).logits[
                0, :-1
            ]  # no end of text in front: the first token does not count
        ids, mask = ids[1:], mask[1:]
        losses.append(F.cross_entropy(logits[mask], ids[mask], reduction="none"))
        right.append((logits.argmax(-1) == ids)[mask])
        answers += bool(mask.any())
        right_answers += bool(mask.any() and right[-1].all())
        num_bytes += int(mask.sum())
    loss = torch.cat(losses)
    mean = loss.mean().item()
    return Evaluation(
        loss=mean,
        perplexity=math.exp(mean),
        bits_per_byte=mean / math.log(2),
        accuracy=torch.cat(right).double().mean().item(),
        tokens=len(loss),
        bytes=num_bytes,
        documents=documents,
        answers=answers,
        answer_accuracy=right_answers / answers,
    )


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1024), (3, 24), (8, 5), (2, 9)])
@pytest.mark.parametrize("max_tokens", [None, 138])
def test_a_mask_leaves_the_answers_and_judges_each_as_a_whole(copying, batch_size, chunk_size, max_tokens):
    tokenizer = Tokenizer.from_file(copying / "tokenizer.json")
    model = biased_model(tokenizer)
    result = evaluate(
        model, tokenizer, copying, batch_size=batch_size, chunk_size=chunk_size, max_tokens=max_tokens
    )
    expected = masked_one_by_one(model, tokenizer, copying, max_tokens or 10**9)
    assert_equal(result, expected)
    assert 0 < expected.answer_accuracy < expected.accuracy < 1


def biased_model(tokenizer):
    """Random weights, and a head that prefers the two tokens that answers are made of."""
    model = tiny_model("mamba-tiny")
    torch.manual_seed(1)
    with torch.no_grad():
        model = type(model)(model.config.model_copy(update={"vocab_size": tokenizer.vocab_size}))
        model = to_dtype(model, torch.float64).eval()
        hidden = model.hidden_states(torch.tensor([tokenizer.encode("a.b>ab")])).hidden.mean(1)
        model.head.weight[tokenizer.encode("ab")] += 5 * hidden / hidden.norm()
    return model


def test_several_answers_in_a_document_are_judged_apart():
    row = perplexity._row(
        [
            TokenisedDocument(np.array([5, 6, 7, 8, 0]), np.array([1, 1, 0, 1, 0], np.uint8)),
            TokenisedDocument(np.array([9, 9, 0]), np.array([1, 0, 1], np.uint8)),
        ],
        0,
    )
    # A first token that counts is predicted from the end of text.
    assert row.targets_N.tolist() == [5, 6, -100, 8, -100, 9, -100, 0]
    assert row.tokens_N.tolist() == [0, 5, 6, 7, 8, 0, 9, 9]
    for right, expected in (([1] * 8, 4), ([0] * 8, 0), ([1, 0, 0, 1, 0, 1, 0, 0], 2)):
        row.right_N[:] = right
        assert perplexity._count_answers(row) == (4, expected)
    prompt = TokenisedDocument(np.array([4, 5, 6, 0]), np.array([0, 0, 1, 0], np.uint8))
    alone = TokenisedDocument(np.array([0]), np.array([0], np.uint8))
    row = perplexity._row([prompt, alone, prompt], 0)
    assert row.tokens_N.tolist() == [4, 5, 6] * 2
    assert row.targets_N.tolist() == [-100, 6, -100] * 2
    assert row.document_ids_N.tolist() == [0] * 3 + [2] * 3
    closing = TokenisedDocument(np.array([4, 0]), np.array([1, 1], np.uint8))
    assert perplexity._count_answers(perplexity._row([closing, closing], 0))[0] == 2


def test_a_mask_that_counts_nothing_that_was_read_is_said(copying):
    tokenizer = Tokenizer.from_file(copying / "tokenizer.json")
    with pytest.raises(DataError, match="counts no target"):
        evaluate(biased_model(tokenizer), tokenizer, copying, max_tokens=6)


def test_text_has_no_answers(model, tokenizer, text):
    result = evaluate(model, tokenizer, text)
    assert result.answers is None
    assert result.answer_accuracy is None
