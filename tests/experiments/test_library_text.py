"""The example text is the same every time, and what is held out is whole documents that training never sees."""

import json
from pathlib import Path

import pytest

from switchmamba.cli import main
from switchmamba.data.index import SourceRecord, read_index
from switchmamba.experiments import library_text
from switchmamba.experiments.library_text import MAX_BYTES, library_documents, write_library_text


def read(path: Path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["name"]: record["text"] for record in records}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_library_text(directory)
    return directory


def test_it_is_byte_for_byte_the_same_every_time(corpus: Path, tmp_path: Path) -> None:
    write_library_text(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_documents_are_divided_and_none_is_in_both(corpus: Path) -> None:
    train, held_out = read(corpus / "train.jsonl"), read(corpus / "validation.jsonl")
    assert not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert train | held_out == dict(library_documents())
    size = sum(map(len, held_out.values())) / sum(map(len, (train | held_out).values()))
    assert 0.04 <= size < 0.12


def test_modules_and_topics_are_there_and_tests_are_not(corpus: Path) -> None:
    names = (read(corpus / "train.jsonl") | read(corpus / "validation.jsonl")).keys()
    assert {"json/decoder.py", "asyncio/events.py", "topic/lambda"} <= names
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]


def test_the_size_is_capped() -> None:
    small = library_documents(max_bytes=200_000)
    size = sum(len(text.encode()) for _, text in small)
    assert size <= 200_000
    assert library_documents()[: len(small)] == small
    assert sum(len(text.encode()) for _, text in library_documents()) <= MAX_BYTES


def test_the_command_prepares_it_and_leaves_it_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = library_documents(max_bytes=200_000)
    monkeypatch.setattr(library_text, "library_documents", lambda max_bytes: few)
    out, text = tmp_path / "example", tmp_path / "example-text"
    assert main(["data", "example", "--out", str(out)]) == 0
    assert str(text / "validation.jsonl") in capsys.readouterr().out
    index = read_index(out)
    assert isinstance(index.source, SourceRecord)
    assert index.source.inputs == (str(text / "train.jsonl"),)
    assert index.vocab_size == 4096
    assert sum(split.documents for split in index.splits.values()) == len(few)
    assert read(text / "train.jsonl") | read(text / "validation.jsonl") == dict(few)


def test_a_directory_in_use_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["data", "example", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} exists" in capsys.readouterr().err
    assert not tmp_path.with_name(f"{tmp_path.name}-text").exists()
