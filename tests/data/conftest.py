import pytest

from switchmamba.data.tokenizer import Tokenizer

WORDS = [
    "the",
    "selective",
    "state",
    "space",
    "keeps",
    "what",
    "it",
    "needs,",
    "Straße",
    "naïve",
    "東京",
    "1984\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 300, enough for a few merges of several bytes."""
    return Tokenizer.train([" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(50)], 300)
