import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from switchmamba.data import tokenizer as module
from switchmamba.data.tokenizer import END_OF_TEXT, Tokenizer
from switchmamba.errors import ConfigError, DataError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TRAINING_TEXT = "It was the best of times, it was the worst of times.\n"


@given(text=ANY_TEXT)
def test_decode_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_end_of_text_is_id_0_and_counts_towards_the_vocabulary_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([0]) == END_OF_TEXT


@given(before=ANY_TEXT, after=ANY_TEXT)
def test_text_cannot_spell_the_end_of_text(tokenizer: Tokenizer, before: str, after: str) -> None:
    text = before + END_OF_TEXT + after
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.decode(ids) == text


def test_text_that_was_trained_on_the_end_of_texts_spelling_cannot_spell_it_either() -> None:
    tokenizer = Tokenizer.train([END_OF_TEXT * 100], 400)
    assert tokenizer.end_of_text_id not in tokenizer.encode(END_OF_TEXT * 3)


@given(text=ANY_TEXT)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 299)))
def test_streaming_any_ids_equals_decoding_them_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.stream_decoder()
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(1, 299)))
def test_decoding_agrees_with_the_library(
    tokenizer: Tokenizer, tmp_path_factory: Any, ids: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    assert tokenizer.decode(ids) == LibraryTokenizer.from_file(str(path)).decode(ids)


def test_a_character_is_held_back_until_its_last_byte(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("é𝄞")  # no merge covers them: one token a byte
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "", "𝄞"]


def test_flush_gives_up_an_unfinished_character_and_starts_afresh(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("𝄞")
    assert [decoder.push(i) for i in ids[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert "".join(decoder.push(i) for i in ids) == "𝄞"


LONG_TEXTS = st.lists(
    st.sampled_from(["word ", "x", "\n", " \n", "東京", "1984", ", ", "'s ", "\t", ".\n", "é"]), max_size=400
)


@given(parts=LONG_TEXTS)
def test_a_text_cut_in_pieces_gets_the_ids_of_the_whole(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 20)
        patch.setattr(module, "_GROUP_CHARACTERS", 50)
        assert tokenizer.encode(text) == whole
        assert [ids.tolist() for ids in tokenizer.encode_batch([text, "", text[::-1]])] == [
            whole,
            [],
            tokenizer.encode(text[::-1]),
        ]


def test_long_texts_are_indeed_cut() -> None:
    pieces = list(module._cut("many words " * 50_000))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 2 * module._PIECE_CHARACTERS


TRAIN_ON_STDIN = """
import sys
from switchmamba.data.tokenizer import Tokenizer

print(Tokenizer.train(sys.stdin.read().split("\\n"), 320).sha256)
"""


def test_training_is_deterministic_whatever_the_order_of_texts_and_the_threads(tmp_path: Path) -> None:
    texts = [
        f"{word} {word}s of number {i}" for i, word in enumerate(["state", "space", "expert", "router"] * 50)
    ]
    expected = Tokenizer.train(texts, 320).sha256
    assert Tokenizer.train(texts[::-1], 320).sha256 == expected
    run = subprocess.run(
        [sys.executable, "-c", TRAIN_ON_STDIN],
        input="\n".join(texts),
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == expected


def test_the_sha256_is_that_of_the_file_and_survives_a_round_trip(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    tokenizer.save(first)
    loaded = Tokenizer.from_file(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert tokenizer.sha256 == loaded.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert loaded.encode(TRAINING_TEXT) == tokenizer.encode(TRAINING_TEXT)


def test_a_vocabulary_that_the_text_cannot_fill_is_smaller_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = Tokenizer.train(["ab"], 8000)
    assert tokenizer.vocab_size == 258
    assert "258 entries, not 8000" in caplog.text


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="256 is under 257"):
        Tokenizer.train([TRAINING_TEXT], 256)


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("token", [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of 300"):
        tokenizer.decode([token])


def edited(tokenizer: Tokenizer, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_end_of_text_elsewhere_than_at_0_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def move_to_the_end(content: dict[str, Any]) -> None:  # as in GPT-2's tokenizer
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {token: i - 1 for token, i in vocab.items() if token != END_OF_TEXT}
        content["added_tokens"][0]["id"] = 299

    moved = Tokenizer.from_file(edited(tokenizer, tmp_path, move_to_the_end))
    assert (moved.end_of_text_id, moved.vocab_size) == (299, 300)
    assert moved.encode(END_OF_TEXT) == [i - 1 for i in tokenizer.encode(END_OF_TEXT)]
    assert moved.decode([299]) == END_OF_TEXT


def test_truncation_and_padding_asked_for_by_the_file_are_not_done(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    library = LibraryTokenizer.from_str(edited(tokenizer, tmp_path, lambda _: None).read_text())
    library.enable_truncation(4)
    library.enable_padding(length=100)
    path = tmp_path / "greedy.json"
    library.save(str(path))
    assert Tokenizer.from_file(path).encode(TRAINING_TEXT) == tokenizer.encode(TRAINING_TEXT)


def remove_end_of_text(content: dict[str, Any]) -> None:
    content["added_tokens"] = []
    content["model"]["vocab"]["something else"] = content["model"]["vocab"].pop(END_OF_TEXT)


def give_two_tokens_one_id(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zzz"] = 1


def set_unknown(content: dict[str, Any]) -> None:
    content["model"]["unk_token"] = "!"


def set_dropout(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.1


def make_ordinary(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["special"] = False


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def forget_a_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zzz"] = content["model"]["vocab"].pop("þ")


def drop_byte_level(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove_end_of_text, r"no <\|endoftext\|> token"),
        (give_two_tokens_one_id, "several tokens have the id 1"),
        (set_unknown, "has the unknown token '!'"),
        (set_dropout, r"dropout=0\.1"),
        (make_ordinary, r"a text can spell <\|endoftext\|>"),
        (lowercase, "does not give back the text"),
        (forget_a_byte, "no token for 1 of the 256 bytes"),
        (drop_byte_level, "does not give back the text"),
    ],
)
def test_a_tokenizer_that_breaks_a_guarantee_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = edited(tokenizer, tmp_path, edit)
    with pytest.raises(DataError, match=message) as refused:
        Tokenizer.from_file(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    library = LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    with pytest.raises(DataError, match="the model is WordLevel"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "not a tokenizer.json"), (b"", "not a tokenizer.json"), (b"\xff", "not UTF-8 at byte 0")],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        Tokenizer.from_file(path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot read the tokenizer: No such file"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
