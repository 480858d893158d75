"""What experts are given is counted as the routers themselves count it, and lifts are what their definition says."""

import pytest
import torch

from switchmamba import LanguageModel
from switchmamba.evaluation.specialisation import (
    TOKEN_CLASSES,
    count_assignments,
    profile_layer,
    record_routing,
    token_class,
)


def tiny_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_preset("moe-mamba-tiny").eval()


def test_counts_equal_the_routers_own_statistics_and_leave_padding_out() -> None:
    model = tiny_model()
    tokens = torch.randint(model.config.vocab_size, (3, 20))
    document_ids = torch.tensor([[-1] * 5 + [0] * 15, [0] * 20, [0] * 10 + [1] * 10])
    with torch.no_grad():
        stats = model(tokens, document_ids).router_stats
    counts = count_assignments(model, [(tokens, document_ids)])
    assert len(counts) == len(stats) > 0
    for count_VE, stat in zip(counts, stats, strict=True):
        assert count_VE.sum(0).tolist() == stat.tokens_per_expert_E.tolist()
        real = tokens[document_ids >= 0]
        assert (
            count_VE.sum(1).tolist()
            == (torch.bincount(real, minlength=model.config.vocab_size) * stat.top_k).tolist()
        )


def test_batches_add_up() -> None:
    model = tiny_model()
    tokens = torch.randint(model.config.vocab_size, (4, 12))
    whole = count_assignments(model, [(tokens, None)])
    parts = count_assignments(model, [(tokens[:1], None), (tokens[1:], None)])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_recording_leaves_no_trace_in_the_model() -> None:
    model = tiny_model()
    tokens = torch.randint(model.config.vocab_size, (1, 4))
    with record_routing(model) as recorded:
        model(tokens)
    model(tokens)
    assert [len(own) for own in recorded] == [1] * len(recorded)


def test_lift_and_shares_follow_their_definitions() -> None:
    #                       expert 0, 1
    counts = torch.tensor([[30, 10], [0, 40], [10, 10]])
    profile = profile_layer(counts, [" def", "1", "x"], layer=2, minimum=5)
    first, second = profile.experts
    assert (profile.layer, profile.assignments) == (2, 100)
    assert (first.share, second.share) == (0.4, 0.6)
    # P(def | expert 0) / P(def) = (30/40) / (40/100)
    assert [(t.text, t.lift, t.count) for t in first.tokens] == [
        (" def", pytest.approx(1.875), 30),
        ("x", pytest.approx(1.25), 10),
    ]
    assert [(t.text, t.count) for t in second.tokens] == [("1", 40)]
    assert first.class_shares["keyword"] == 0.75
    assert second.class_shares["number"] == 1.0
    assert first.class_shares["punctuation"] == 0.0


def test_rare_tokens_are_not_named() -> None:
    profile = profile_layer(torch.tensor([[19, 0], [40, 60]]), ["rare", "x"], layer=0, minimum=20)
    assert [token.text for token in profile.experts[0].tokens] == []


def test_information_is_one_if_the_token_decides_and_zero_if_it_does_not() -> None:
    decided = profile_layer(torch.tensor([[50, 0], [0, 50]]), ["a", "b"], layer=0)
    indifferent = profile_layer(torch.tensor([[20, 30], [40, 60]]), ["a", "b"], layer=0)
    assert decided.information == pytest.approx(1)
    assert indifferent.information == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" def", "keyword"),
        ("None", "keyword"),
        (" self", "word"),
        ("Error", "word"),
        ("ing", "word piece"),
        ("_name", "word piece"),
        ("    ", "space, line end"),
        ("\n\n", "space, line end"),
        ("", "space, line end"),
        (" 42", "number"),
        ("):\n", "punctuation"),
        ("\ufffd", "punctuation"),
    ],
)
def test_tokens_are_sorted_into_classes(text: str, expected: str) -> None:
    assert token_class(text) == expected
    assert expected in TOKEN_CLASSES
