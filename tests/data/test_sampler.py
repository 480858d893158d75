from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.data.sampler import IGNORE_INDEX, Batch, Sampler, every_target_once, permutation
from switchmamba.errors import ConfigError, DataError

VOCAB_SIZE = 100_000
END_OF_TEXT = 0


class TokenLists:
    """Documents in memory."""

    def __init__(
        self,
        documents: Sequence[npt.NDArray[Any]],
        vocab_size: int,
        masks: Sequence[npt.NDArray[Any]] | None = None,
    ) -> None:
        self._documents, self._masks = documents, masks
        self.vocab_size = vocab_size
        self.num_documents = len(documents)
        self.document_offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)

    def mask(self, index: int) -> npt.NDArray[Any] | None:
        return None if self._masks is None else self._masks[index]

    def document(self, index: int) -> npt.NDArray[Any]:
        return self._documents[index]


def documents(lengths: Sequence[int], dtype: type[np.unsignedinteger] = np.uint32) -> TokenLists:
    """Documents of the given lengths whose tokens are all different, but for the end of text that closes each."""
    ids = np.arange(1, sum(lengths) + 1, dtype=dtype)
    cuts = np.split(ids, np.cumsum(lengths)[:-1])
    for document in cuts:
        document[-1] = END_OF_TEXT
    return TokenLists(cuts, VOCAB_SIZE)


def uneven(count: int, seed: int = 0) -> TokenLists:
    return documents(np.random.default_rng(seed).integers(1, 40, count).tolist())


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**63 - 1)


def same(a: Batch, b: Batch) -> bool:
    ids_equal = (
        a.document_ids_BL is None and b.document_ids_BL is None
        if a.document_ids_BL is None or b.document_ids_BL is None
        else torch.equal(a.document_ids_BL, b.document_ids_BL)
    )
    return torch.equal(a.tokens_BL, b.tokens_BL) and torch.equal(a.targets_BL, b.targets_BL) and ids_equal


def concatenate(batches: Sequence[Batch]) -> Batch:
    ids = [batch.document_ids_BL for batch in batches if batch.document_ids_BL is not None]
    return Batch(
        torch.cat([batch.tokens_BL for batch in batches]),
        torch.cat([batch.targets_BL for batch in batches]),
        torch.cat(ids) if ids else None,
    )


# The order


@given(n=st.integers(0, 500), key=st.tuples(SEEDS, st.integers(0, 2**40), st.integers(0, 1)))
def test_permutation_holds_every_number_once(n: int, key: tuple[int, int, int]) -> None:
    assert sorted(permutation(n, *key).tolist()) == list(range(n))


def test_the_order_never_changes_with_a_release() -> None:
    assert permutation(10, 0, 0, 0).tolist() == [2, 1, 9, 5, 7, 0, 8, 3, 4, 6]
    assert permutation(10, 2**63 - 1, 5, 1).tolist() == [0, 2, 5, 7, 4, 9, 8, 1, 3, 6]
    sampler = Sampler(uneven(50), 16, seed=7, reset_state=True)
    assert [sampler.position(n) for n in (0, 1, 100, 10_000)] == [(0, 30), (0, 27), (1, 2), (175, 0)]


def test_seed_epoch_and_purpose_all_change_the_permutation() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == len(keys)


def test_every_position_is_equally_likely() -> None:
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), permutation(8, seed, 0, 0)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 100  # 49 degrees of freedom: beyond 100 once in 50,000


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    data = uneven(200)
    asked_in_order = Sampler(data, 16, seed=3, reset_state=True)
    total = 3 * asked_in_order.windows_per_epoch
    expected = [asked_in_order.sample(n) for n in range(total)]
    backwards = Sampler(data, 16, seed=3, reset_state=False)
    for n in reversed(range(total)):
        np.testing.assert_array_equal(backwards.sample(n).tokens, expected[n].tokens)
        np.testing.assert_array_equal(backwards.sample(n).document_ids, expected[n].document_ids)


def test_another_seed_and_another_epoch_give_another_order() -> None:
    data = uneven(200)
    sampler = Sampler(data, 16, seed=0, reset_state=True)
    count = sampler.windows_per_epoch
    first = sampler.batch(0, count)
    assert not same(first, sampler.batch(count, count))
    assert not same(first, Sampler(data, 16, seed=1, reset_state=True).batch(0, count))


def test_a_batch_is_not_made_of_neighbours_in_a_long_document() -> None:
    sampler = Sampler(documents([10_000, 10_000]), 10, seed=0, reset_state=True)
    starts = sampler.batch(0, 64).tokens_BL[:, 0].sort().values
    assert (starts.diff() == 10).sum() < 8  # in the stream's own order it would be 63


@given(lengths=LENGTHS, context_length=st.integers(1, 8), seed=SEEDS, epoch=st.integers(0, 3))
def test_each_epoch_has_every_token_but_the_first_and_the_tail_as_a_target_once(
    lengths: list[int], context_length: int, seed: int, epoch: int
) -> None:
    if sum(lengths) < context_length + 1:
        lengths.append(context_length + 1)
    sampler = Sampler(documents(lengths), context_length, seed, reset_state=False)
    count = sampler.windows_per_epoch
    batch = sampler.batch(epoch * count, count)
    assert count == (sum(lengths) - 1) // context_length
    words = batch.targets_BL[batch.targets_BL != END_OF_TEXT].tolist()
    assert len(words) == len(set(words))
    missing = sum(lengths) - batch.targets_BL.numel()
    assert 1 <= missing <= context_length  # the stream's first token, and the tail


@given(lengths=LENGTHS, context_length=st.integers(1, 8), seed=SEEDS)
def test_windows_are_pieces_of_whole_documents_in_sequence(
    lengths: list[int], context_length: int, seed: int
) -> None:
    data = documents([*lengths, context_length + 1])
    text = [data.document(i).tolist() for i in range(data.num_documents)]
    sampler = Sampler(data, context_length, seed, reset_state=True)
    for n in range(sampler.windows_per_epoch):
        tokens, ids, mask = sampler.sample(n)
        assert mask is None
        assert len(tokens) == len(ids) == context_length + 1
        assert set(np.diff(ids)) <= {0, 1}
        ends = np.flatnonzero(np.diff(ids)) + 1
        assert np.array_equal(ends - 1, np.flatnonzero(tokens[:-1] == END_OF_TEXT))
        for piece in np.split(tokens, ends):
            assert any(
                piece.tolist() == document[i : i + len(piece)]
                for document in text
                for i in range(len(document) - len(piece) + 1)
            )


# Resuming, and sharing a batch out


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_resuming_at_every_step_of_two_epochs_gives_the_exact_next_samples(
    dtype: type[np.unsignedinteger],
) -> None:
    data = documents([5, 40, 1, 90, 13, 7, 200, 31], dtype)
    batch_size = 4
    uninterrupted = Sampler(data, 12, seed=1, reset_state=True)
    steps = -(-2 * uninterrupted.windows_per_epoch // batch_size)
    batches = [uninterrupted.batch(step * batch_size, batch_size) for step in range(steps + 1)]
    for step in range(steps):
        resumed = Sampler(data, 12, seed=1, reset_state=True)
        assert same(resumed.batch(step * batch_size, batch_size), batches[step])
        assert same(resumed.batch((step + 1) * batch_size, batch_size), batches[step + 1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_how_many_share_it(world_size: int) -> None:
    data, batch_size = uneven(100), 8
    alone = Sampler(data, 16, seed=5, reset_state=True)
    ranks = [Sampler(data, 16, seed=5, reset_state=True) for _ in range(world_size)]
    share = batch_size // world_size
    for step in range(2 * alone.windows_per_epoch // batch_size):
        first = step * batch_size
        parts = [rank.batch(first + i * share, share) for i, rank in enumerate(ranks)]
        assert same(concatenate(parts), alone.batch(first, batch_size))


def test_a_million_samples_over_changing_world_sizes_are_each_taken_once() -> None:
    data = documents([30_000, 17, 40_000])
    sampler = Sampler(data, 7, seed=0, reset_state=True)
    per_epoch, batch_size, total = sampler.windows_per_epoch, 64, 1_000_000 // 64 * 64
    stops = sorted(np.random.default_rng(0).integers(0, total // batch_size, 50).tolist())
    taken = np.zeros(total // per_epoch * per_epoch, np.uint8)
    for start, stop, world_size in zip(
        [0, *stops], [*stops, total // batch_size], [2, 1, 2, 4, 2] * 11, strict=False
    ):
        share = batch_size // world_size
        for rank in range(world_size):
            first = np.arange(start, stop)[:, None] * batch_size + rank * share
            numbers = (first + np.arange(share)).ravel()
            taken[numbers[numbers < len(taken)]] += 1
    assert (taken == 1).all()
    for epoch in range(len(taken) // per_epoch):
        positions = [sampler.position(n) for n in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert {e for e, _ in positions} == {epoch}
        assert (
            np.bincount([window for _, window in positions], minlength=per_epoch).tolist() == [1] * per_epoch
        )


# Boundaries


def test_the_target_across_a_boundary_is_masked_only_when_state_is_reset() -> None:
    data = documents([3, 4, 9])  # 1 2 0 | 4 5 6 0 | 8 9 …
    reset = Sampler(data, 8, seed=0, shuffle=False, reset_state=True).batch(0, 1)
    assert reset.document_ids_BL is not None
    assert reset.tokens_BL.tolist() == [[1, 2, 0, 4, 5, 6, 0, 8]]
    assert reset.document_ids_BL.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
    assert reset.targets_BL.tolist() == [[2, 0, IGNORE_INDEX, 5, 6, 0, IGNORE_INDEX, 9]]
    assert reset.num_targets == 6
    kept = Sampler(data, 8, seed=0, shuffle=False, reset_state=False).batch(0, 1)
    assert kept.document_ids_BL is None
    assert kept.targets_BL.tolist() == [[2, 0, 4, 5, 6, 0, 8, 9]]
    assert torch.equal(kept.tokens_BL, reset.tokens_BL)


def test_a_boundary_just_behind_the_last_input_masks_the_last_target() -> None:
    batch = Sampler(documents([4, 4]), 4, seed=0, shuffle=False, reset_state=True).batch(0, 1)
    assert batch.targets_BL.tolist() == [[2, 3, 0, IGNORE_INDEX]]


def test_the_end_of_text_itself_is_always_a_target() -> None:
    sampler = Sampler(documents([2, 30, 5, 17, 2, 2, 40] * 10), 16, seed=0, reset_state=True)
    batch = sampler.batch(0, sampler.windows_per_epoch)
    ends = torch.cat([batch.tokens_BL, batch.targets_BL[:, -1:]], dim=1)[:, 1:] == END_OF_TEXT
    assert (batch.targets_BL[ends] == END_OF_TEXT).all()


def test_without_shuffling_every_epoch_is_the_text_in_order() -> None:
    sampler = Sampler(documents([20, 20]), 5, seed=0, shuffle=False, reset_state=False)
    count = sampler.windows_per_epoch
    in_order = sampler.batch(0, count)
    assert in_order.targets_BL.flatten().tolist() == [*range(2, 20), 0, *range(21, 37)]
    assert same(in_order, sampler.batch(3 * count, count))


# Masks


def masked(data: TokenLists) -> TokenLists:
    """The same documents; every token whose id is divisible by three counts."""
    pieces = [data.document(i) for i in range(data.num_documents)]
    return TokenLists(pieces, data.vocab_size, [(piece % 3 == 0).astype(np.uint8) for piece in pieces])


@given(lengths=LENGTHS, context_length=st.integers(1, 8), seed=SEEDS, reset_state=st.booleans())
def test_a_mask_takes_targets_away_and_changes_nothing_else(
    lengths: list[int], context_length: int, seed: int, reset_state: bool
) -> None:
    data = documents([*lengths, context_length + 1])
    plain = Sampler(data, context_length, seed, reset_state=reset_state)
    counted = Sampler(masked(data), context_length, seed, reset_state=reset_state)
    count = 2 * plain.windows_per_epoch
    whole, part = plain.batch(0, count), counted.batch(0, count)
    assert torch.equal(part.tokens_BL, whole.tokens_BL)
    expected = torch.where(whole.targets_BL % 3 == 0, whole.targets_BL, IGNORE_INDEX)
    assert torch.equal(part.targets_BL, expected)
    assert (whole.document_ids_BL is None) == (part.document_ids_BL is None) == (not reset_state)


@given(lengths=LENGTHS, context_length=st.integers(1, 12), seed=SEEDS)
def test_what_windows_cut_off_is_what_their_masks_leave_out(
    lengths: list[int], context_length: int, seed: int
) -> None:
    filler = context_length - (sum(lengths) - 1) % context_length  # every target lies in a whole window
    data = documents([*lengths, filler])
    ones = [np.ones(n, np.uint8) for n in np.diff(data.document_offsets)]
    data = TokenLists([data.document(i) for i in range(data.num_documents)], VOCAB_SIZE, ones)
    assert Sampler(data, context_length, seed, reset_state=True).cuts() is None
    sampler = Sampler(data, context_length, seed, reset_state=True, from_beginning=True)
    cut, lost = set(), 0
    for n in range(sampler.windows_per_epoch):
        window = sampler.sample(n)
        assert window.mask is not None
        behind = window.mask[1:] == 0
        cut |= set(window.document_ids[1:][behind].tolist())
        lost += int(behind.sum())
    cuts = sampler.cuts()
    assert cuts is not None
    assert (cuts.cut, cuts.documents, cuts.longest) == (len(cut), len(ones), max(*lengths, filler))
    assert cuts.lost * data.document_offsets[-1] == pytest.approx(lost)
    assert cuts.always_cut == sum(n > context_length + 1 for n in (*lengths, filler)) <= cuts.cut


def test_evaluation_respects_the_mask() -> None:
    data = documents([5, 1, 9, 30])
    for plain, part in zip(
        every_target_once(data, 7, 2, reset_state=True),
        every_target_once(masked(data), 7, 2, reset_state=True),
        strict=True,
    ):
        expected = torch.where(plain.targets_BL % 3 == 0, plain.targets_BL, IGNORE_INDEX)
        assert torch.equal(part.targets_BL, expected)


# Evaluation


@given(
    lengths=LENGTHS,
    context_length=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    reset_state=st.booleans(),
)
def test_evaluation_counts_every_target_once_in_order(
    lengths: list[int], context_length: int, batch_size: int, reset_state: bool
) -> None:
    data = documents(lengths)
    stream = np.concatenate([data.document(i) for i in range(data.num_documents)])
    batches = list(every_target_once(data, context_length, batch_size, reset_state=reset_state))
    tokens = [token for batch in batches for token in batch.tokens_BL.flatten().tolist()]
    targets = np.array([target for batch in batches for target in batch.targets_BL.flatten().tolist()], int)
    assert tokens == stream[:-1].tolist()
    crossing = np.flatnonzero(stream[:-1] == END_OF_TEXT) if reset_state else np.array([], int)
    expected = stream[1:].astype(int)
    expected[crossing] = IGNORE_INDEX
    assert targets.tolist() == expected.tolist()
    assert all(batch.tokens_BL.shape == (batch_size, context_length) for batch in batches[:-2])


# Refusals


def test_data_shorter_than_a_window_is_refused_with_both_numbers() -> None:
    Sampler(documents([4, 5]), 8, seed=0, reset_state=True)
    with pytest.raises(DataError, match="the split has 9 tokens, one sample needs 10"):
        Sampler(documents([4, 5]), 9, seed=0, reset_state=True)


def test_an_id_beyond_the_vocabulary_is_refused_before_it_reaches_a_model() -> None:
    data = TokenLists([np.array([1, 2, 500, 0], np.uint16)], 300)
    with pytest.raises(DataError, match="token id 500 is outside the vocabulary of 300"):
        Sampler(data, 3, seed=0, reset_state=True).sample(0)


@pytest.mark.parametrize(("context_length", "seed"), [(0, 0), (1, -1), (1, 2**63)])
def test_an_impossible_argument_is_refused(context_length: int, seed: int) -> None:
    with pytest.raises(ConfigError):
        Sampler(documents([5]), context_length, seed, reset_state=True)


def test_samples_count_from_0() -> None:
    with pytest.raises(ConfigError, match="sample -1 does not exist"):
        Sampler(documents([5]), 2, 0, reset_state=True).sample(-1)


def test_from_the_beginning_only_answers_count_whose_question_is_in_the_window():
    mask = np.array([0, 0, 1, 1], np.uint8)
    talks = TokenLists([np.arange(4) + 4 * i for i in range(3)], VOCAB_SIZE, [mask] * 3)
    counted = {}
    for from_beginning in (False, True):
        batches = every_target_once(talks, 5, 8, reset_state=True, from_beginning=from_beginning)
        targets = [t for batch in batches for t in batch.targets_BL.flatten().tolist()]
        counted[from_beginning] = [t for t in targets if t != IGNORE_INDEX]
    assert counted == {False: [2, 3, 6, 7, 10, 11], True: [2, 3, 10]}
