"""A continuation is as probable as its tokens one by one, whatever it is batched with."""

import random

import pytest
import torch

from switchmamba.errors import ConfigError
from switchmamba.evaluation.continuations import Pair, score_continuations
from tests.generation.tiny_models import PRESETS, tiny_model

VOCABULARY = 200


def pairs(seed: int = 0) -> list[Pair]:
    """Contexts of 1 to 40 tokens, most of them of several continuations of 1 to 12 tokens."""
    numbers = random.Random(seed)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, longest)))

    contexts = [ids(40) for _ in range(6)] + [(3,)]
    return [Pair(numbers.choice(contexts), ids(12)) for _ in range(20)]


@torch.inference_mode()
def one_by_one(model, pair):
    logits_LV = model(torch.tensor([[*pair.context, *pair.continuation]])).logits[0]
    log_p_LV = logits_LV.double().log_softmax(-1)[len(pair.context) - 1 : -1]
    targets = torch.tensor(pair.continuation)
    chosen = log_p_LV.gather(1, targets[:, None])
    return chosen.sum().item(), bool((log_p_LV.argmax(-1) == targets).all())


@pytest.mark.parametrize("preset", PRESETS)
def test_batched_shuffled_and_shared_equals_one_by_one(preset):
    model = tiny_model(preset)
    asked = pairs()
    for batch_size, chunk_size in ((1, 1024), (3, 5), (32, 7)):
        found = score_continuations(model, asked, batch_size=batch_size, chunk_size=chunk_size)
        for pair, score in zip(asked, found, strict=True):
            log_p, greedy = one_by_one(model, pair)
            assert score.log_probability == pytest.approx(log_p, rel=1e-5)
            assert score.greedy == greedy


def test_the_most_probable_continuation_is_greedy_and_no_other():
    model = tiny_model()
    context = (5, 17, 3)
    with torch.inference_mode():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    found = score_continuations(model, [Pair(context, (best,)), Pair(context, ((best + 1) % VOCABULARY,))])
    assert [score.greedy for score in found] == [True, False]


def test_probabilities_of_all_next_tokens_sum_to_one():
    model = tiny_model()
    everything = [Pair((7, 8), (token,)) for token in range(model.config.vocab_size)]
    found = score_continuations(model, everything, batch_size=64)
    assert sum(torch.tensor([s.log_probability for s in found]).exp()) == pytest.approx(1, rel=1e-5)


def test_a_shared_context_is_read_once(monkeypatch):
    model = tiny_model()
    read = []
    hidden_states = model.hidden_states

    def counting(tokens, *rest, **options):
        read.append(tokens.numel())
        return hidden_states(tokens, *rest, **options)

    monkeypatch.setattr(model, "hidden_states", counting)
    score_continuations(model, [Pair(tuple(range(100)), (token,)) for token in range(4)])
    assert sum(read) == 99 + 4


def test_progress_counts_to_the_end():
    done = []
    score_continuations(tiny_model(), pairs(), batch_size=3, progress=lambda *numbers: done.append(numbers))
    assert done[-1] == (20, 20)
    assert sorted(done) == done


@pytest.mark.parametrize("pair", [Pair((), (1,)), Pair((1,), ())])
def test_nothing_to_score_is_refused(pair):
    with pytest.raises(ConfigError, match="need a token each"):
        score_continuations(tiny_model(), [pair])
