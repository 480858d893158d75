from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.data.corpus import Document
from switchmamba.data.split import by_content, by_tail


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(text, len(text.encode()), "somewhere", 0) for text in texts]


def test_the_share_held_out_is_near_the_fraction() -> None:
    parts = list(by_content(documents([f"document {i}" for i in range(20_000)]), 0.05, seed=0))
    held_out = sum(part.split == "validation" for part in parts)
    assert abs(held_out - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5  # four standard deviations


def test_a_documents_split_depends_on_its_text_and_the_seed_alone() -> None:
    texts = [f"document {i}" for i in range(2000)]
    chosen = {part.text for part in by_content(documents(texts), 0.1, seed=3) if part.split == "validation"}
    backwards = documents([*texts, "another"][::-1])
    assert chosen == {
        part.text for part in by_content(backwards, 0.1, seed=3) if part.split == "validation"
    } - {"another"}
    assert chosen != {
        part.text for part in by_content(documents(texts), 0.1, seed=4) if part.split == "validation"
    }


def test_a_larger_fraction_only_adds_documents() -> None:
    texts = documents([f"document {i}" for i in range(500)])
    few, many = (
        {part.text for part in by_content(texts, fraction, 0) if part.split == "validation"}
        for fraction in (0.1, 0.3)
    )
    assert few < many


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1),
    fraction=st.floats(0.001, 0.999),
)
def test_the_tail_split_keeps_every_character_in_order(texts: list[str], fraction: float) -> None:
    total = sum(len(text.encode()) for text in texts)
    parts = list(by_tail(documents(texts), fraction, total))
    assert "".join(part.text for part in parts) == "".join(texts)
    splits = [part.split for part in parts]
    assert splits == sorted(splits)  # train before validation
    assert splits[-1] == "validation"
    assert all(part.num_bytes == len(part.text.encode()) for part in parts)
    assert len(parts) <= len(texts) + 1


def test_the_tail_is_cut_after_a_line() -> None:
    text = "line\n" * 1000 + "last line without end"
    head, tail = by_tail(documents([text]), 0.1, len(text))
    assert head.text.endswith("line\n")
    assert tail.text.startswith("line\n")
    assert 0.1 <= tail.num_bytes / len(text) < 0.102


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_whole_documents_before_and_after_the_cut_stay_whole(fraction: float) -> None:
    texts = [f"{i:05d}" for i in range(200)]
    parts = list(by_tail(documents(texts), fraction, 1000))
    assert [part.text for part in parts if part.split == "validation"] == texts[-int(200 * fraction) :]
