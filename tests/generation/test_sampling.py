import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba.errors import ConfigError, NonFiniteError
from switchmamba.generation.sampling import choose, draw, probabilities, row_generator
from switchmamba.generation.settings import SamplingSettings

law = settings(deadline=None)
logit = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, 2.0, -math.inf]))
rows = st.integers(1, 40).flatmap(
    lambda vocabulary: st.lists(logit, min_size=vocabulary, max_size=vocabulary)
)
logits_rows = rows.filter(lambda row: max(row) > -math.inf).map(lambda row: torch.tensor([row]))
temperatures = st.floats(0.05, 5)


def ranking(logits: torch.Tensor) -> list[int]:
    """Token ids, the most probable first, the lower id first among equals."""
    row = logits[0].tolist()
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@law
@given(logits_rows, temperatures)
def test_temperature_alone_is_softmax_of_scaled_logits(logits, temperature):
    expected = (logits.double() / temperature).softmax(-1).float()
    torch.testing.assert_close(
        probabilities(logits, SamplingSettings(temperature=temperature)), expected, rtol=1e-4, atol=1e-7
    )


@law
@given(logits_rows, temperatures, st.integers(1, 50))
def test_top_k_keeps_exactly_the_k_most_probable(logits, temperature, k):
    kept = probabilities(logits, SamplingSettings(temperature=temperature, top_k=k))[0]
    allowed = ranking(logits)[:k]
    assert {token for token, p in enumerate(kept.tolist()) if p > 0} <= set(allowed)
    full = (logits.double() / temperature).softmax(-1)[0]
    torch.testing.assert_close(
        kept[allowed].double(), full[allowed] / full[allowed].sum(), rtol=1e-4, atol=1e-6
    )


@law
@given(logits_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_holds_the_share(logits, top_p):
    kept = probabilities(logits, SamplingSettings(top_p=top_p))[0]
    full = logits.double().softmax(-1)[0]
    order = ranking(logits)
    number = max(int((kept > 0).sum()), 1)
    positive = [token for token in order if kept[token] > 0]
    assert positive == order[: len(positive)]
    assert full[order[: number - 1]].sum() < top_p + 1e-6
    if top_p < 1:
        assert full[order[:number]].sum() >= top_p - 1e-6


@law
@given(logits_rows, temperatures, st.floats(0, 1))
def test_min_p_keeps_tokens_near_the_most_probable_one(logits, temperature, min_p):
    full = (logits / temperature).softmax(-1)[0]
    kept = probabilities(logits, SamplingSettings(temperature=temperature, min_p=min_p))[0]
    assert (full[kept > 0] >= min_p * full.max() * (1 - 1e-4)).all()
    dropped = (kept == 0) & (full > 1e-30)
    assert (full[dropped] <= min_p * full.max() * (1 + 1e-4)).all()


@law
@given(
    logits_rows,
    temperatures,
    st.one_of(st.none(), st.integers(1, 50)),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_every_combination_is_a_distribution_that_holds_the_most_probable_token(
    logits, temperature, k, top_p, min_p
):
    result = probabilities(logits, SamplingSettings(temperature, k, top_p, min_p))
    assert result.dtype == torch.float32
    assert (result >= 0).all()
    torch.testing.assert_close(result.sum(), torch.tensor(1.0))
    assert result[0, ranking(logits)[0]] > 0


def test_filters_apply_in_the_documented_order():
    # top_k leaves 0.5, 0.3, 0.15 → renormalised 0.526, 0.316, 0.158: a top_p of 0.8 then needs two tokens;
    # over the whole distribution it would need two as well, but 0.82 would need three there and two here.
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (probabilities(logits, SamplingSettings(top_k=3, top_p=0.82)) > 0).tolist() == [
        [True, True, False, False]
    ]
    assert (probabilities(logits, SamplingSettings(top_p=0.82)) > 0).tolist() == [[True, True, True, False]]


def test_among_equal_logits_the_lower_ids_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert probabilities(logits, SamplingSettings(top_k=3))[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert choose(torch.tensor([[0.0, 5.0, 5.0]]), SamplingSettings(temperature=0), []).tolist() == [1]


def test_temperature_zero_is_all_on_the_maximum():
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 1.0, 2.0]])
    assert probabilities(logits, SamplingSettings(temperature=0)).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 9999.0]])
    assert probabilities(logits, SamplingSettings(temperature=1e-30)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_raise_and_name_the_row(temperature, bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteError, match="row 1"):
        choose(logits, SamplingSettings(temperature=temperature), [torch.Generator() for _ in range(3)])


def test_a_row_that_allows_no_token_raises():
    with pytest.raises(NonFiniteError, match="row 0"):
        probabilities(torch.full((1, 4), -math.inf), SamplingSettings())


@settings(law, max_examples=20)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=30).filter(any), st.integers(0, 2**63 - 1))
def test_draws_follow_the_distribution(weights, seed):
    distribution = torch.tensor([weights], dtype=torch.float32)
    distribution /= distribution.sum()
    generator = row_generator(seed, 0)
    draws = torch.tensor([draw(distribution, [generator]).item() for _ in range(400)])
    frequency = torch.bincount(draws, minlength=len(weights)) / 400
    assert (frequency[distribution[0] == 0] == 0).all()
    # Six standard deviations of a binomial share: a false alarm in 10⁹.
    assert ((frequency - distribution[0]).abs() <= 6 * (0.25 / 400) ** 0.5).all()


def test_a_draw_never_lands_on_an_impossible_token_at_the_edge(monkeypatch):
    distribution = torch.tensor([[0.0, 0.25, 0.5, 0.0]])
    for uniform, expected in ((0.0, 1), (1 - 2**-53, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *_, uniform=uniform, **__: torch.tensor(uniform, dtype=torch.float64)
        )
        assert draw(distribution, [torch.Generator()]).tolist() == [expected]


def test_a_rows_draws_do_not_depend_on_the_other_rows():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    settings = SamplingSettings(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, seed=5)
    together = [row_generator(5, row) for row in range(6)]
    batch = torch.stack([choose(logits, settings, together) for _ in range(20)])
    for row in range(6):
        alone = row_generator(5, row)
        single = [choose(logits[row : row + 1], settings, [alone]).item() for _ in range(20)]
        assert single == batch[:, row].tolist()


def test_streams_differ_between_rows_and_between_seeds():
    streams = {
        tuple(torch.rand(4, generator=row_generator(seed, row)).tolist())
        for seed in range(10)
        for row in range(10)
    }
    assert len(streams) == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = "):
        SamplingSettings(**{field: value})
