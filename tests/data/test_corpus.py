import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.data.corpus import Corpus
from switchmamba.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
TEXTS = ["First.\nIn two lines.", "Zwei: ß", "three 東京\r\n", '"quoted" \\ {}', "\u2028 is no line end here"]


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def refusals(corpus: Corpus) -> list[str]:
    errors: list[DataError] = []
    list(corpus.documents(errors.append))
    return [str(error) for error in errors]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"novel.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("Ahab – the captain.\n\nIshmael.\r\n".encode()))
    (document,) = Corpus([path]).documents()
    assert document.text == "Ahab – the captain.\n\nIshmael.\r\n"
    assert document.num_bytes == len(document.text.encode())
    assert document.place == str(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_each_line_of_jsonl_is_a_document_and_blank_lines_are_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"web.jsonl{suffix}"
    lines = jsonl(*({"id": i, "text": text} for i, text in enumerate(TEXTS)))
    path.write_bytes(COMPRESS[suffix](lines.replace(b"\n", b"\n \n", 1) + b"\n"))
    documents = list(Corpus([path]).documents())
    assert [document.text for document in documents] == TEXTS
    assert [document.place for document in documents] == [f"{path}, line {n}" for n in (1, 3, 4, 5, 6)]
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in TEXTS]


def test_the_last_line_needs_no_newline_and_the_field_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(jsonl({"body": "a", "text": "x"}, {"body": "b"}).rstrip(b"\n"))
    assert texts(Corpus([path], field="body")) == ["a", "b"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl({"text": "a"}))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb")
    assert texts(Corpus([tmp_path])) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_streams_joined_in_one_file_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](jsonl({"text": text})) for text in TEXTS))
    assert texts(Corpus([path])) == TEXTS


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_zstandard_frames_split_anywhere_give_back_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("zstd") / "a.txt.zst"
    bounds = [0, *sorted(cuts), 300]
    content = ("x" + data.hex()).encode()
    frames = [content[2 * a : 2 * b] for a, b in zip(bounds, [*bounds[1:-1], 1000], strict=False)]
    path.write_bytes(b"".join(COMPRESS[".zst"](frame) for frame in frames))
    assert texts(Corpus([path])) == [content.decode()]


def test_directories_are_read_whole_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.txt", "a/b/c.txt.gz", "README.md", "MANIFEST.json", ".git/x.txt", "a/.y.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(COMPRESS[".gz" if name.endswith(".gz") else ""](name.encode()))
    assert texts(Corpus([tmp_path])) == ["a/b/c.txt.gz", "a/z.txt", "b.txt"]
    assert texts(Corpus([tmp_path], text_suffixes=[".md"])) == [
        "README.md",
        "a/b/c.txt.gz",
        "a/z.txt",
        "b.txt",
    ]


def test_globs_match_and_no_file_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("1.txt", "2.txt", "sub/3.txt"):
        (tmp_path / name).write_text(name)
    assert texts(Corpus([f"{tmp_path}/**/*.txt"])) == ["1.txt", "2.txt", "sub/3.txt"]
    monkeypatch.chdir(tmp_path)
    assert texts(Corpus(["[2-9].txt", ".", "2.txt"])) == ["2.txt", "1.txt", "sub/3.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "[1].txt").write_text("brackets")
    assert texts(Corpus([tmp_path / "[1].txt"])) == ["brackets"]


def test_bytes_read_grow_to_the_size_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(jsonl(*({"text": f"{i}"} for i in range(1000)))))
    corpus = Corpus([tmp_path])
    read = [document.bytes_read for document in corpus.documents()]
    assert read == sorted(read)
    assert corpus.num_bytes == read[-1] == sum(path.stat().st_size for path in tmp_path.iterdir())


BAD_LINES = [
    (b"{'text': 1}", "invalid JSON at character 1: Expecting property name"),
    (b'{"text": "a"', "invalid JSON at character 12"),
    (b'{"txt": "a"}', "no field 'text'; did you mean txt?"),
    (b'{"text": null}', "field 'text' is NoneType, not a string"),
    (b'{"text": ["a"]}', "field 'text' is list, not a string"),
    (b'{"text": ""}', "empty document"),
    (b'["a"]', "holds a JSON list, not an object with a field 'text'"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"[" * 200_000, "JSON beyond the parser's limits"),
    (b'{"text": ' + b"9" * 5000 + b"}", "JSON beyond the parser's limits"),
    (b'{"text": "' + b"x" * 300_000 + b'"}', "over the limit of 250000 bytes"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_by_number_and_can_be_skipped(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl({"text": "before"}) + line + b"\n" + jsonl({"text": "after"}))
    corpus = Corpus([path], max_record_bytes=250_000)
    with pytest.raises(DataError) as refused:
        texts(corpus)
    assert str(refused.value).startswith(f"{path}, line 2: ")
    assert message in str(refused.value)
    errors: list[DataError] = []
    assert [document.text for document in corpus.documents(errors.append)] == ["before", "after"]
    assert list(map(str, errors)) == [str(refused.value)]


def test_bytes_that_are_not_utf8_are_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    first = jsonl({"text": "ä"})
    path.write_bytes(gzip.compress(first + b'{"text": "\xe4"}\n'))
    assert refusals(Corpus([path])) == [f"{path}, line 2: not UTF-8 at byte {len(first) + 10}"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    assert refusals(Corpus([path])) == [f"{path}: not UTF-8 at byte 3"]


def test_the_limit_on_records_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    assert texts(Corpus([path], max_record_bytes=100)) == ["x" * 100]
    assert refusals(Corpus([path], max_record_bytes=99)) == [
        f"{path}: over the limit of 99 bytes (max-record-bytes)"
    ]
    path = tmp_path / "a.jsonl"
    line = jsonl({"text": "x" * 100})
    path.write_bytes(line * 3)
    assert len(texts(Corpus([path], max_record_bytes=len(line) - 1))) == 3
    assert len(refusals(Corpus([path], max_record_bytes=len(line) - 2))) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt.zst", b""), ("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.jsonl.gz", b"\n \n")],
)
def test_a_file_without_documents_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[Path(name).suffix if name.count(".") == 2 else ""](content))
    assert refusals(Corpus([path])) == [f"{path}: empty, holds no document"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_every_truncation_of_a_compressed_file_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESS[suffix](jsonl(*({"text": text} for text in TEXTS)))
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        errors = refusals(Corpus([path]))
        assert len(errors) == 1, length
        assert errors[0].startswith(f"{path}, line ")
        assert "cannot be read: " in errors[0]


def test_a_truncated_file_still_gives_the_documents_before_the_fault_and_names_the_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl.zst"
    lines = [jsonl({"text": f"{i} {i * i**0.5}"}) for i in range(20_000)]
    whole = COMPRESS[".zst"](b"".join(lines))
    path.write_bytes(whole[: len(whole) // 2])
    errors: list[DataError] = []
    count = len(list(Corpus([path]).documents(errors.append)))
    assert 0 < count < 20_000
    assert f"line {count + 1}: cannot be read: Compressed file ended" in str(errors[0])


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"this was never compressed at all")
    (error,) = refusals(Corpus([path]))
    assert error.startswith(f"{path}: cannot be read: ")


def test_a_tiny_file_that_expands_beyond_the_limit_is_refused_without_expanding_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.txt.zst"
    path.write_bytes(COMPRESS[".zst"](bytes(2**27)))
    assert path.stat().st_size < 2**15
    assert refusals(Corpus([path], max_record_bytes=1000)) == [
        f"{path}: over the limit of 1000 bytes (max-record-bytes)"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "missing.txt: no such file, directory or glob match"),
        ("*.nothing", "*.nothing: no such file, directory or glob match"),
        ("a.parquet", "a.parquet: unknown kind of file; known are .txt, .jsonl, bare or with .gz, .xz, .zst"),
        ("empty", "empty: no file here is .txt, .jsonl, bare or with .gz, .xz, .zst; see --text-suffix"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused_before_reading(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as refused:
        Corpus([tmp_path / name])
    assert message in str(refused.value)
