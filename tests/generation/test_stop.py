from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.errors import ConfigError
from switchmamba.generation.stop import StopMatcher

texts = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def passed(stops, pieces):
    """What a matcher lets through of ``pieces``, and whether it stopped."""
    matcher = StopMatcher(stops)
    result = ""
    for piece in pieces:
        result += matcher.push(piece)
        if matcher.stopped:
            return result, True
    return result + matcher.flush(), False


@given(texts, stops, st.lists(st.integers(0, 30), max_size=5))
def test_the_way_a_text_is_cut_into_pieces_does_not_matter(text, stops, cuts):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert passed(stops, pieces) == passed(stops, list(text)) == passed(stops, [text])


@given(texts, stops)
def test_the_text_ends_where_the_first_stop_text_to_be_complete_begins(text, stops):
    result, stopped = passed(stops, list(text))
    assert text.startswith(result)
    assert not any(stop in result for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        end = next(n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops))
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        assert result == text[: end - max(map(len, complete))]
    else:
        assert result == text


def test_only_what_may_become_a_stop_text_is_held_back():
    matcher = StopMatcher(["\n\nQ:", "END"])
    assert [matcher.push(piece) for piece in ("one\n", "\n", "E", "N", "d\n\n")] == [
        "one",
        "",
        "\n\n",
        "",
        "ENd",
    ]
    assert matcher.push("Q: next") == ""
    assert matcher.stopped


@pytest.mark.parametrize("stops", ["text", [""], ["a", ""]])
def test_a_stop_text_that_is_empty_or_no_sequence_is_refused(stops):
    with pytest.raises(ConfigError, match="stop"):
        StopMatcher(stops)
