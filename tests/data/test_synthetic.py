"""Generated tasks are what their definition says, the same on every machine, and count their answers alone."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmamba import cli
from switchmamba.data.index import read_index
from switchmamba.data.prepare import prepare
from switchmamba.data.sampler import IGNORE_INDEX, Sampler
from switchmamba.data.shards import TokenShards
from switchmamba.data.synthetic import InductionHeads, SelectiveCopying, prepare_synthetic
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError

KEYS = st.integers(0, 2**63 - 1)


def texts(directory: Path, split: str = "train") -> list[tuple[str, str]]:
    """Return the documents of a split, the end of text spelt out, and the part of each that counts."""
    shards = TokenShards.open(directory, split)
    tokenizer = Tokenizer.from_file(shards.tokenizer_path)
    pairs = []
    for i in range(shards.num_documents):
        ids, mask = shards.document(i), shards.mask(i)
        pairs.append((tokenizer.decode(ids), tokenizer.decode(ids[mask == 1])))
    return pairs


@given(st.integers(1, 40), st.integers(1, 40), st.integers(3, 62), KEYS)
def test_selective_copying_asks_for_the_data_tokens_in_their_order(length, data_tokens, vocabulary, key):
    task = SelectiveCopying(length=max(length, data_tokens), data_tokens=data_tokens, vocabulary=vocabulary)
    text, answer = task.example(key)
    sequence, begin, written = text.partition(">")
    assert (len(sequence), begin, written) == (task.length, ">", answer)
    assert sequence.replace(".", "") == answer
    assert len(answer) == task.answer_tokens == data_tokens
    assert task.example(key) == (text, answer)


@given(st.integers(3, 60), st.integers(3, 62), KEYS)
def test_induction_heads_ask_for_what_followed_the_special_token(length, vocabulary, key):
    task = InductionHeads(length=length, vocabulary=vocabulary)
    text, answer = task.example(key)
    assert len(text) == length + task.answer_tokens == length + 1
    assert text.count("#") == 2
    assert text[length - 1] == "#"
    assert text[text.index("#") + 1] == text[length] == answer != "#"


def test_every_place_and_every_symbol_is_drawn_about_equally_often():
    examples = [InductionHeads(length=12, vocabulary=6).example(0, i) for i in range(5000)]
    places = np.bincount([example.text.index("#") for example in examples])
    assert len(places) == 10
    assert abs(places - 500).max() < 120
    answers = np.unique([example.answer for example in examples], return_counts=True)
    assert answers[0].tolist() == list("abcde")
    assert abs(answers[1] - 1000).max() < 150
    hidden = [SelectiveCopying(length=10, data_tokens=3, vocabulary=6).example(0, i) for i in range(5000)]
    filled = np.array([[symbol != "." for symbol in example.text[:10]] for example in hidden]).sum(0)
    assert abs(filled - 1500).max() < 150


def test_only_the_answer_counts(tmp_path):
    task = SelectiveCopying(length=12, data_tokens=3)
    index = prepare_synthetic(task, tmp_path / "data", train_examples=30, validation_examples=7, seed=5)
    for number, (split, count) in enumerate((("train", 30), ("validation", 7))):
        examples = [task.example(5, number, i) for i in range(count)]
        assert texts(tmp_path / "data", split) == [(e.text + "<|endoftext|>", e.answer) for e in examples]
        assert index.splits[split].targets == 3 * count
        assert index.splits[split].tokens == (12 + 1 + 3 + 1) * count
        TokenShards.open(tmp_path / "data", split).verify()
    assert index == read_index(tmp_path / "data")


def test_the_examples_never_change_with_a_release(tmp_path):
    for task, digest in (
        (SelectiveCopying(length=20, data_tokens=4), "0f29fde49330fc62"),
        (InductionHeads(length=20), "ad36b226e35f0f3b"),
    ):
        prepare_synthetic(task, tmp_path / task.name, train_examples=50, validation_examples=0, seed=1)
        content = (tmp_path / task.name / "train-00000.tokens").read_bytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_more_examples_change_none_and_another_seed_changes_all(tmp_path):
    task = InductionHeads(length=20)
    for name, count, seed in (("few", 10, 0), ("many", 25, 0), ("other", 10, 1)):
        prepare_synthetic(task, tmp_path / name, train_examples=count, validation_examples=2, seed=seed)
    few, many, other = (texts(tmp_path / name) for name in ("few", "many", "other"))
    assert many[:10] == few
    assert not set(few) & set(other)
    assert texts(tmp_path / "few", "validation") == texts(tmp_path / "many", "validation")
    assert not set(few) & set(texts(tmp_path / "few", "validation"))


def test_the_held_out_examples_may_have_another_length(tmp_path):
    task = InductionHeads(length=10)
    index = prepare_synthetic(
        task, tmp_path / "data", train_examples=4, validation_examples=4, validation_length=30
    )
    assert [len(text.removesuffix("<|endoftext|>")) for text, _ in texts(tmp_path / "data")] == [11] * 4
    held_out = texts(tmp_path / "data", "validation")
    assert [len(text.removesuffix("<|endoftext|>")) for text, _ in held_out] == [31] * 4
    assert index.source.length == {"train": 10, "validation": 30}


def test_all_tasks_share_one_tokenizer(tmp_path):
    for i, task in enumerate((InductionHeads(vocabulary=5), SelectiveCopying(vocabulary=40))):
        prepare_synthetic(task, tmp_path / str(i), train_examples=1, validation_examples=1)
    assert (tmp_path / "0" / "tokenizer.json").read_bytes() == (
        tmp_path / "1" / "tokenizer.json"
    ).read_bytes()


def test_a_window_of_one_example_holds_one_whole_example_and_its_answer(tmp_path):
    prepare_synthetic(SelectiveCopying(length=12, data_tokens=3), tmp_path / "data", train_examples=40)
    shards = TokenShards.open(tmp_path / "data")
    for reset_state in (True, False):
        batch = Sampler(shards, 17, seed=0, reset_state=reset_state).batch(0, 80)
        assert (batch.tokens_BL[:, -1] == shards.end_of_text_id).all()
        counted = batch.targets_BL != IGNORE_INDEX
        assert counted[:, 12:15].all()
        assert batch.num_targets == 80 * 3
        assert (batch.targets_BL[:, 12:15] == batch.tokens_BL[:, 13:16]).all()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"train_examples": 0, "validation_examples": 0}, "0 training"),
        ({"train_examples": -1}, "-1 training"),
        ({"seed": -1}, "--seed -1"),
        ({"validation_length": 2}, "length = 2"),
    ],
)
def test_impossible_arguments_are_refused_and_nothing_is_written(options, part, tmp_path):
    with pytest.raises(ConfigError, match=part):
        prepare_synthetic(InductionHeads(), tmp_path / "data", **options)
    assert list(tmp_path.iterdir()) == []


# The command


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main(["data", "synthetic", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_every_option_reaches_the_generator(tmp_path, capsys):
    options = ["--length", 20, "--vocabulary", 9, "--data-tokens", 5, "--seed", 3, "--validation-length", 31]
    counts = ["--train-examples", 6, "--validation-examples", 4]
    code, out, _ = run(capsys, "selective-copying", "--out", tmp_path / "a", *options, *counts, "--json")
    task = SelectiveCopying(length=20, vocabulary=9, data_tokens=5)
    index = prepare_synthetic(
        task, tmp_path / "b", train_examples=6, validation_examples=4, validation_length=31, seed=3
    )
    assert (code, json.loads(out)) == (0, index.model_dump(mode="json", exclude_none=True))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_the_context_length_to_train_with_is_printed(tmp_path, capsys):
    words = ["induction-heads", "--out", tmp_path / "data", "--length", 20, "--train-examples", 5]
    code, out, _ = run(capsys, *words, "--validation-length", 30, "--validation-examples", 3)
    assert code == 0
    assert "one example of train: --data.context_length 22" in out
    assert "one example of validation: --data.context_length 32" in out
    assert "task: induction-heads, vocabulary 16, length: train 20, validation 30" in out
    assert cli.main(["data", "show", str(tmp_path / "data"), "--verify"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sorting"], "sorting"),
        (["induction-heads", "--data-tokens", 4], "data_tokens"),
        (["selective-copying", "--length", 4, "--data-tokens", 5], "5 data tokens do not fit"),
        (["induction-heads", "--vocabulary", 63], "vocabulary = 63"),
    ],
)
def test_what_cannot_be_generated_is_one_line_and_exit_2(words, part, tmp_path, capsys):
    code, out, err = run(capsys, *words, "--out", tmp_path / "data")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    code, _, err = run(capsys, "induction-heads", "--out", tmp_path / "data")
    assert code == 2
    assert re.search("data exists", err)


def test_generating_does_not_import_torch(tmp_path):
    code = (
        "import sys; from switchmamba.cli import main; "
        f"main(['data', 'synthetic', 'induction-heads', '--out', {str(tmp_path / 'data')!r}, '--train-examples', '3']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


# Masks on the disk


def test_masks_follow_their_documents_over_several_shards(tmp_path):
    masked = tmp_path / "data"
    task = InductionHeads(length=10)
    prepare_synthetic(task, masked, train_examples=20, validation_examples=20, shard_tokens=130)
    shards = TokenShards.open(masked)
    assert len(read_index(masked).splits["train"].shards) == 2
    assert shards.masked
    assert shards.num_targets == 20
    assert all(shards.mask(i).tolist() == [0] * 10 + [1, 0] for i in range(20))
    assert not shards.mask(0).flags.writeable


def test_text_is_prepared_as_before_there_were_masks(tmp_path):
    (tmp_path / "a.txt").write_text("no mask here")
    prepare([tmp_path / "a.txt"], Tokenizer.train([], 257), tmp_path / "data", validation_fraction=0)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    assert "targets" not in index["splits"]["train"]
    assert "mask" not in index["splits"]["train"]["shards"][0]
    shards = TokenShards.open(tmp_path / "data")
    assert not shards.masked
    assert shards.mask(0) is None
    assert shards.num_targets == shards.num_tokens == 13
