import errno
import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from switchmamba.data.prepare import Progress, prepare
from switchmamba.data.shards import TokenShards
from switchmamba.data.split import SPLITS
from switchmamba.data.tokenizer import END_OF_TEXT, Tokenizer
from switchmamba.errors import ConfigError, DataError, SwitchMambaError

TEXTS = [f"Document {i} keeps the state of {'the space ' * (i % 9)}" for i in range(200)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_texts(directory: Path, tokenizer: Tokenizer, split: str) -> list[str]:
    shards = TokenShards.open(directory, split)  # type: ignore[arg-type]
    return [tokenizer.decode(shards.document(i)[:-1]) for i in range(shards.num_documents)]


def directory_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_document_is_in_one_split_in_the_order_of_the_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary = prepare([source], tokenizer, tmp_path / "data", validation_fraction=0.1)
    train, validation = (read_texts(tmp_path / "data", tokenizer, split) for split in SPLITS)
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert summary.index.source.split_by == "content"
    for split, texts in zip(SPLITS, (train, validation), strict=True):
        record = summary.index.splits[split]
        assert record.documents == len(texts)
        assert record.text_bytes == sum(len(text.encode()) for text in texts)
        assert record.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_the_directory_holds_what_the_index_names_and_nothing_else(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary = prepare([source], tokenizer, tmp_path / "data", validation_fraction=0.1, shard_tokens=1000)
    named = {"index.json", "tokenizer.json"}
    for record in summary.index.splits.values():
        named |= {record.offsets.file, *(shard.file for shard in record.shards)}
        assert all(shard.tokens <= 1000 for shard in record.shards)
        assert record.tokens == sum(shard.tokens for shard in record.shards)
    assert set(directory_bytes(tmp_path / "data")) == named
    assert Tokenizer.from_file(tmp_path / "data/tokenizer.json").sha256 == summary.index.tokenizer_sha256
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "data"]


def test_a_document_longer_than_a_shard_has_one_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "c" * 50, "d"])
    summary = prepare([source], tokenizer, tmp_path / "data", validation_fraction=0, shard_tokens=20)
    assert [shard.documents for shard in summary.index.splits["train"].shards] == [1, 1, 1]
    assert read_texts(tmp_path / "data", tokenizer, "train") == ["ab", "c" * 50, "d"]


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for name in ("one", "two"):
        prepare([source], "bpe:300", tmp_path / name, validation_fraction=0.1, shard_tokens=1000)
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")


def test_a_ready_tokenizer_is_copied_byte_for_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer.save(tmp_path / "ready.json")
    prepare([source], tmp_path / "ready.json", tmp_path / "data")
    assert (tmp_path / "data/tokenizer.json").read_bytes() == (tmp_path / "ready.json").read_bytes()


def test_a_document_cannot_forge_a_boundary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"one{END_OF_TEXT}two", "three"])
    prepare([source], tokenizer, tmp_path / "data", validation_fraction=0)
    shards = TokenShards.open(tmp_path / "data")
    shards.verify()
    assert shards.num_documents == 2
    assert read_texts(tmp_path / "data", tokenizer, "train") == [f"one{END_OF_TEXT}two", "three"]


def test_a_vocabulary_over_65536_is_stored_in_32_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "small.json")
    content = json.loads((tmp_path / "small.json").read_bytes())
    content["model"]["vocab"] |= {f"filler {i}": i for i in range(300, 70_000)}
    content["model"]["vocab"]["Document"] = 70_000
    content["model"]["merges"] += [["D", "o"], ["Do", "c"], ["Doc", "u"], ["Docu", "m"], ["Docum", "e"]]
    content["model"]["merges"] += [["Docume", "n"], ["Documen", "t"]]
    pieces = ["Do", "Doc", "Docu", "Docum", "Docume", "Documen"]
    content["model"]["vocab"] |= {piece: 70_001 + i for i, piece in enumerate(pieces)}
    (tmp_path / "large.json").write_text(json.dumps(content))
    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "large.json", tmp_path / "data")
    shards = TokenShards.open(tmp_path / "data")
    shards.verify()
    assert shards.index.dtype == "uint32"
    assert shards.document(0).dtype == np.uint32
    assert shards.document(0)[0] == 70_000


def test_text_too_short_for_a_split_by_document_is_cut_at_its_tail(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    summary = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "data", validation_fraction=0.1)
    (head,), (tail,) = (read_texts(tmp_path / "data", tokenizer, split) for split in SPLITS)
    assert head + tail == text
    assert summary.index.source.split_by == "tail"
    assert abs(len(tail) / len(text) - 0.1) < 0.01
    assert summary.index.splits["validation"].text_bytes == len(tail)


def test_a_first_try_that_left_a_split_empty_leaves_no_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary = prepare([source], tokenizer, tmp_path / "data", validation_fraction=1e-9, shard_tokens=500)
    assert summary.index.source.split_by == "tail"
    shards = sum(len(record.shards) for record in summary.index.splits.values())
    assert len(directory_bytes(tmp_path / "data")) == shards + 4  # index, tokenizer, two offsets


def test_validation_files_are_the_validation_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    held_out = write_jsonl(tmp_path / "b.jsonl", ["held", "out"])
    prepare([train], tokenizer, tmp_path / "data", validation_inputs=[held_out])
    assert read_texts(tmp_path / "data", tokenizer, "train") == TEXTS
    assert read_texts(tmp_path / "data", tokenizer, "validation") == ["held", "out"]


def test_a_tokenizer_is_trained_from_every_file_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10_000)
    seen: list[str] = []
    train = Tokenizer.train

    def spy(texts: Sequence[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    prepare([tmp_path], "bpe:260", tmp_path / "data", tokenizer_sample_bytes=300)
    assert seen == ["a" * 100, "b" * 100, "c" * 100]


def test_bad_records_stop_everything_unless_skipping_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}) for text in TEXTS]
    source.write_text("\n".join([*good[:3], "{", *good[3:], '{"txt": 1}']))
    with pytest.raises(DataError, match="line 4: invalid JSON"):
        prepare([source], tokenizer, tmp_path / "data")
    assert list(tmp_path.iterdir()) == [source]
    summary = prepare([source], tokenizer, tmp_path / "data", skip_bad=True)
    assert summary.index.source.skipped == 2
    assert summary.first_skipped is not None
    assert "line 4: invalid JSON" in summary.first_skipped
    assert sum(record.documents for record in summary.index.splits.values()) == len(TEXTS)


def test_skipping_is_counted_once_though_the_text_is_read_three_times(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "only this\\nand this"}\n{')
    summary = prepare([source], "bpe:257", tmp_path / "data", skip_bad=True)
    assert (summary.index.source.split_by, summary.index.source.skipped) == ("tail", 1)


def test_nothing_but_bad_records_is_an_error_with_their_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[")
    with pytest.raises(
        DataError, match=r"no document can be used, 2 records were skipped; the first: .*line 1"
    ):
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "data", skip_bad=True)


def test_text_too_short_to_hold_any_out_is_refused_with_the_remedy(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no text is left for the train split.*--validation-fraction 0"):
        prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "data")
    assert prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "data", validation_fraction=0).tokens == 2


def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt.gz"
    source.write_bytes(gzip.compress(b"text " * 100)[:-5])
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        prepare([source], tokenizer, tmp_path / "deep/er/data")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0 is outside 0 ≤ fraction < 1"),
        ({"validation_fraction": float("nan")}, "--validation-fraction nan"),
        ({"seed": -1}, "--seed -1"),
        ({"shard_tokens": 0}, "--shard-tokens 0 is under 1"),
        ({"max_record_bytes": 0}, "--max-record-bytes 0 is under 1"),
        ({"tokenizer": "bpe:256"}, "--tokenizer bpe:256: a number of at least 257"),
        ({"tokenizer": "bpe:many"}, "--tokenizer bpe:many: a number of at least 257"),
        ({"inputs": []}, "no --input"),
        ({"text_suffixes": ["md"]}, "--text-suffix md must begin with a dot: .md"),
    ],
)
def test_an_impossible_argument_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    call = {"inputs": [tmp_path / "a.txt"], "tokenizer": "bpe:300", "out": tmp_path / "data", **arguments}
    with pytest.raises(ConfigError) as refused:
        prepare(**call)  # type: ignore[arg-type]
    assert message in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_exists_is_not_overwritten_but_an_empty_directory_is_used(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("text of some length")
    out = tmp_path / "data"
    out.mkdir()
    prepare([tmp_path / "a.txt"], tokenizer, out)
    before = directory_bytes(out)
    for taken in (out, tmp_path / "a.txt"):
        with pytest.raises(ConfigError, match=f"--out {taken} exists"):
            prepare([tmp_path / "a.txt"], tokenizer, taken)
    assert directory_bytes(out) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, interruption: type[BaseException]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def interrupt(_progress: Progress) -> None:
        assert any(".tmp-" in path.name for path in tmp_path.iterdir())
        raise interruption

    with pytest.raises(interruption):
        prepare([source], tokenizer, tmp_path / "data", progress=interrupt)
    assert list(tmp_path.iterdir()) == [source]


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 10_000])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            SwitchMambaError, match="data: cannot be written: File too large; nothing was left behind"
        ) as e:
            prepare([source], tokenizer, tmp_path / "data", validation_fraction=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.exit_code == 1
    assert list(tmp_path.iterdir()) == [source]


def test_an_error_of_the_system_names_the_destination(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def fail(_self: Path, _target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SwitchMambaError, match="data: cannot be written: No space left on device"):
        prepare([source], tokenizer, tmp_path / "data")
    assert list(tmp_path.iterdir()) == [source]


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    reports: list[Progress] = []
    summary = prepare(
        [source], "bpe:300", tmp_path / "data", validation_fraction=0.1, progress=reports.append
    )
    assert [report.stage for report in reports] == ["training the tokenizer"] * len(TEXTS) + ["tokenising"]
    assert reports[-1].bytes_done == reports[-1].bytes_total == source.stat().st_size
    assert (reports[-1].documents, reports[-1].tokens) == (len(TEXTS), summary.tokens)


def test_preparing_does_not_import_torch() -> None:
    script = (
        "import sys, switchmamba.data.prepare, switchmamba.data.sampler; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
