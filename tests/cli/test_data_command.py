import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from switchmamba import cli
from switchmamba.data.shards import TokenShards

PREPARE = ("data", "prepare")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} of some", "n": i}) + "\n" for i in range(300)))
    return path


def words(text: Path, out: Path, *more: str) -> list[str]:
    return [*PREPARE, "--input", str(text), "--tokenizer", "bpe:300", "--out", str(out), *more]


def test_prepared_data_can_be_opened_and_is_described_on_stdout(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert cli.main(words(text, out)) == 0
    printed = capsys.readouterr()
    shards = TokenShards.open(out)
    assert f"{shards.num_tokens:,}" in printed.out
    assert f"{shards.num_documents:,}" in printed.out
    assert shards.tokenizer_sha256 in printed.out
    assert "tokens/s" in printed.err


def test_json_on_stdout_is_pure_and_the_same_from_prepare_and_show(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert cli.main(words(text, out, "--json")) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert cli.main(["data", "show", str(out), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == prepared
    assert prepared["splits"]["train"]["tokens"] == TokenShards.open(out).num_tokens


def test_every_option_reaches_the_library(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.md").write_text("more")
    (tmp_path / "c.txt").write_text("held out")
    options = [
        "--input",
        str(tmp_path / "b.md"),
        "--text-suffix",
        ".md",
        "--validation-input",
        str(tmp_path / "c.txt"),
    ]
    options += [
        "--seed",
        "3",
        "--shard-tokens",
        "500",
        "--max-record-bytes",
        "90",
        "--validation-fraction",
        "0.5",
    ]
    options += ["--tokenizer-sample-bytes", "1000", "--json"]
    assert cli.main(words(text, tmp_path / "data", *options)) == 0
    index = json.loads(capsys.readouterr().out)
    assert index["source"] == {
        "inputs": [str(text), str(tmp_path / "b.md")],
        "validation_inputs": [str(tmp_path / "c.txt")],
        "field": "text",
        "text_suffixes": [".md"],
        "max_record_bytes": 90,
        "validation_fraction": 0.5,
        "seed": 3,
        "split_by": "input",
        "skipped": 0,
    }
    assert index["splits"]["validation"]["text_bytes"] == len("held out")
    assert len(index["splits"]["train"]["shards"]) > 3


def test_skipped_records_are_counted_on_stderr_and_in_what_is_shown(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with text.open("a") as file:
        file.write('{"txt": 1}\n{\n')
    assert cli.main(words(text, tmp_path / "data", "--skip-bad")) == 0
    printed = capsys.readouterr()
    assert f"warning: 2 records skipped; the first: {text}, line 301: no field 'text'" in printed.err
    assert "skipped: 2 records" in printed.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--validation-fraction", "1.5"], 2, "--validation-fraction 1.5 is outside 0 ≤ fraction < 1"),
        (["--validation-fraction", "few"], 2, "validation-fraction"),
        (["--shard-tokens", "0"], 2, "--shard-tokens 0 is under 1"),
        (["--tokenizer", "bpe:1"], 2, "--tokenizer bpe:1: a number of at least 257"),
        (["--no-such-option"], 2, "no-such-option"),
        (["--tokenizer", "nowhere.json"], 3, "nowhere.json: cannot read the tokenizer"),
        (["--tokenizer", "gpt2"], 3, "no such file; name a tokenizer.json, or bpe:8000 to train one"),
        (["--input", "nowhere.txt"], 3, "nowhere.txt: no such file, directory or glob match"),
        (["--field", "n"], 3, "a.jsonl, line 1: field 'n' is int, not a string"),
        (["--field", "body"], 3, "a.jsonl, line 1: no field 'body'"),
        (["--max-record-bytes", "10"], 3, "a.jsonl, line 1: over the limit of 10 bytes"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code_and_nothing_is_written(
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    started = time.monotonic()
    assert cli.main(words(text, tmp_path / "data", *options)) == code
    assert time.monotonic() - started < 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty, holds no document"),
        ("a.txt", b"ab\xffc", "a.txt: not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl, line 2: invalid JSON at character 7"),
        ("a.txt.gz", gzip.compress(b"text" * 1000)[:-9], "a.txt.gz: cannot be read: Compressed file ended"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd", "a.txt.zst: cannot be read: Compressed file ended"),
        ("a.doc", b"text", "a.doc: unknown kind of file"),
    ],
    ids=[
        "empty",
        "latin-1",
        "latin-1 line",
        "cut-off line",
        "cut-off gzip",
        "cut-off zstandard",
        "unknown kind",
    ],
)
def test_text_that_cannot_be_used_exits_3_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert cli.main(words(path, tmp_path / "data")) == 3
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == [path]


def test_the_refusal_of_a_bad_record_names_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {"a.txt": "some text", "b.txt": ""}.items():
        (tmp_path / name).write_text(content)
    assert cli.main(words(tmp_path, tmp_path / "data")) == 3
    assert capsys.readouterr().err.endswith(
        "b.txt: empty, holds no document; --skip-bad skips such records\n"
    )
    assert cli.main(words(tmp_path, tmp_path / "data", "--skip-bad")) == 0


def test_files_of_other_kinds_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.bin", "c.bin.gz", "d", ".hidden.bin"):
        (tmp_path / name).write_text("some text")
    assert cli.main(words(tmp_path, tmp_path / "data")) == 0
    assert "ignored files: 1 without suffix, 2 .bin; --text-suffix" in capsys.readouterr().err


def test_an_existing_directory_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(text, tmp_path)) == 2
    assert (
        capsys.readouterr().err
        == f"error: --out {tmp_path} exists; name a directory that does not, or an empty one\n"
    )


def test_show_refuses_what_is_no_data_or_damaged(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "show", str(tmp_path)]) == 3
    assert "no index.json; prepare it with" in capsys.readouterr().err
    assert cli.main(words(text, tmp_path / "data")) == 0
    shard = tmp_path / "data/train-00000.tokens"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert cli.main(["data", "show", str(tmp_path / "data")]) == 0
    capsys.readouterr()
    assert cli.main(["data", "show", str(tmp_path / "data"), "--verify"]) == 3
    assert capsys.readouterr().err.startswith(f"error: {shard}: damaged")


@pytest.fixture
def half_prepared(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """`data prepare` in a process of its own, in the middle of writing shards of a.jsonl to data."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 2000}) + "\n" for i in range(800)))
    arguments = words(path, tmp_path / "data", "--tokenizer-sample-bytes", "1000")
    command = [sys.executable, "-m", "switchmamba", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.tmp-*/*.tokens")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "error: terminated")],
)
def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, half_prepared: "subprocess.Popen[str]", number: int, code: int, message: str
) -> None:
    half_prepared.send_signal(number)
    _, errors = half_prepared.communicate(timeout=60)
    assert half_prepared.returncode == code
    assert errors.splitlines()[-1] == message
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_what_a_living_one_writes_is_not(
    tmp_path: Path, text: Path, half_prepared: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    (unfinished,) = tmp_path.glob("data.tmp-*")
    half_prepared.send_signal(signal.SIGSTOP)
    assert cli.main(words(text, tmp_path / "data")) == 0
    assert unfinished.is_dir()
    half_prepared.kill()
    half_prepared.wait()
    shutil.rmtree(tmp_path / "data")
    assert cli.main(words(text, tmp_path / "data")) == 0
    assert f"warning: removing {unfinished}, left by an interrupted run\n" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]
