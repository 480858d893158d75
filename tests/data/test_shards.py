import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switchmamba.data.index import INDEX_FILE, read_index, token_dtype
from switchmamba.data.prepare import prepare
from switchmamba.data.shards import TokenShards
from switchmamba.data.synthetic import InductionHeads, prepare_synthetic
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import DataError

TEXTS = [f"Document {i}: " + "state space " * (i % 7) for i in range(60)]


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Sixty documents in several shards, a few of them held out."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = tmp_path / "data"
    prepare([source], tokenizer, out, validation_fraction=0.1, shard_tokens=500)
    return out


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Documents with masks, in two shards a split."""
    out = tmp_path / "masked"
    task = InductionHeads(length=10)
    prepare_synthetic(task, out, train_examples=20, validation_examples=20, shard_tokens=130)
    return out


def rewrite_index(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the index and make its sha256 fit again, as a forger would."""
    path = directory / INDEX_FILE
    body = json.loads(path.read_bytes())
    del body["sha256"]
    edit(body)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**body, "sha256": hashlib.sha256(canonical).hexdigest()}))


def test_documents_come_back_from_several_shards(prepared: Path, tokenizer: Tokenizer) -> None:
    texts = []
    for split in ("train", "validation"):
        shards = TokenShards.open(prepared, split)
        assert shards.num_documents == len(shards.document_offsets) - 1
        assert len(shards.index.splits[split].shards) > (split == "train")
        for i in range(shards.num_documents):
            ids = shards.document(i)
            assert ids[-1] == tokenizer.end_of_text_id
            assert len(ids) == shards.document_offsets[i + 1] - shards.document_offsets[i]
            texts.append(tokenizer.decode(ids[:-1]))
        assert shards.num_tokens == sum(len(shards.document(i)) for i in range(shards.num_documents))
    assert sorted(texts) == sorted(TEXTS)


def test_documents_cannot_be_written_to(prepared: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenShards.open(prepared).document(0)[0] = 1


def test_sound_shards_verify(prepared: Path) -> None:
    for split in ("train", "validation"):
        TokenShards.open(prepared, split).verify()


@pytest.mark.parametrize("kind", ["prepared", "masked"])
def test_any_flipped_bit_is_found_and_its_file_named(kind: str, request: pytest.FixtureRequest) -> None:
    prepared: Path = request.getfixturevalue(kind)
    rng = np.random.default_rng(0)
    for path in sorted(prepared.iterdir()):
        content = path.read_bytes()
        for byte in rng.integers(0, len(content), 20):
            damaged = bytearray(content)
            damaged[byte] ^= 1 << rng.integers(0, 8)
            path.write_bytes(damaged)
            with pytest.raises(DataError) as refused:
                for split in ("train", "validation"):
                    TokenShards.open(prepared, split).verify()
            assert str(prepared) in str(refused.value)
            if path.suffix in (".tokens", ".mask"):
                assert f"{path}: damaged, its sha256 does not match" in str(refused.value)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["train-00001.tokens", "train.offsets", "validation-00000.tokens", "index.json"]
)
def test_a_missing_file_is_named(prepared: Path, name: str) -> None:
    (prepared / name).unlink()
    with pytest.raises(DataError, match=name):
        for split in ("train", "validation"):
            TokenShards.open(prepared, split)


def test_a_missing_mask_is_named(masked: Path) -> None:
    (masked / "train-00001.mask").unlink()
    with pytest.raises(DataError, match=r"train-00001\.mask"):
        TokenShards.open(masked)


def test_a_mask_that_does_not_fit_its_index_is_refused(masked: Path) -> None:
    def drop_mask(body: dict[str, Any]) -> None:
        del body["splits"]["train"]["shards"][1]["mask"]

    def another_count(body: dict[str, Any]) -> None:
        body["splits"]["train"]["targets"] = 21

    content = (masked / INDEX_FILE).read_bytes()
    rewrite_index(masked, another_count)
    with pytest.raises(DataError, match="count 20 targets, the index says 21"):
        TokenShards.open(masked).verify()
    (masked / INDEX_FILE).write_bytes(content)
    rewrite_index(masked, drop_mask)
    with pytest.raises(DataError, match="every shard has a mask"):
        TokenShards.open(masked)


def test_a_mask_of_other_values_is_refused(masked: Path) -> None:
    path = masked / "train-00000.mask"
    path.write_bytes(path.read_bytes().replace(b"\x01", b"\x02"))

    def own_hash(body: dict[str, Any]) -> None:
        record = body["splits"]["train"]["shards"][0]["mask"]
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    rewrite_index(masked, own_hash)
    with pytest.raises(DataError, match="holds 2, a mask is 0 or 1"):
        TokenShards.open(masked).verify()


def test_a_mask_of_another_size_is_refused_on_opening(masked: Path) -> None:
    path = masked / "train-00000.mask"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000\.mask: 119 bytes, the index says 120"):
        TokenShards.open(masked)


@pytest.mark.parametrize("change", [-1, 1, 2])
@pytest.mark.parametrize("name", ["train-00000.tokens", "train.offsets"])
def test_a_file_of_another_size_is_refused_on_opening(prepared: Path, name: str, change: int) -> None:
    content = (prepared / name).read_bytes()
    (prepared / name).write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(
        DataError, match=f"{name}: {len(content) + change} bytes, the index says {len(content)}"
    ):
        TokenShards.open(prepared)


def test_a_directory_that_was_never_prepared_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json; prepare it with `switchmamba data prepare`"):
        TokenShards.open(tmp_path)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "data", validation_fraction=0)
    with pytest.raises(DataError, match="no split 'validation', it holds train; name one of those"):
        TokenShards.open(tmp_path / "data", "validation")


def set_version(body: dict[str, Any]) -> None:
    body["version"] = 2


def set_format(body: dict[str, Any]) -> None:
    body["format"] = "somebody else's"


def escape_the_directory(body: dict[str, Any]) -> None:
    body["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"


def set_negative_count(body: dict[str, Any]) -> None:
    body["splits"]["train"]["tokens"] = -1


def forget_a_field(body: dict[str, Any]) -> None:
    del body["vocab_size"]


def set_dtype(body: dict[str, Any]) -> None:
    body["dtype"] = "object"


def claim_other_counts(body: dict[str, Any]) -> None:
    body["splits"]["train"]["shards"].pop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_version, "version 2, this release reads 1"),
        (set_format, "not an index of token shards"),
        (escape_the_directory, r"splits\.train\.shards\.0\.file"),
        (set_negative_count, r"splits\.train\.tokens"),
        (forget_a_field, "vocab_size"),
        (set_dtype, "dtype"),
        (claim_other_counts, "offsets and shards of train disagree"),
    ],
)
def test_a_foreign_or_forged_index_is_refused(
    prepared: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite_index(prepared, edit)
    with pytest.raises(DataError, match=message):
        TokenShards.open(prepared)


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_an_index_that_is_no_index_is_refused(prepared: Path, content: bytes) -> None:
    (prepared / INDEX_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: "):
        TokenShards.open(prepared)


def forge_shard(directory: Path, edit: Callable[[np.ndarray], None]) -> Path:
    """Change tokens of the first shard and make its sha256 fit again."""
    path = directory / "train-00000.tokens"
    ids = np.fromfile(path, "<u2")
    edit(ids)
    ids.tofile(path)

    def fit(body: dict[str, Any]) -> None:
        body["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    rewrite_index(directory, fit)
    return path


def test_a_token_beyond_the_vocabulary_is_found_by_position(prepared: Path) -> None:
    def put_300(ids: np.ndarray) -> None:
        ids[3] = 300

    path = forge_shard(prepared, put_300)
    with pytest.raises(DataError, match=f"{path}: token 3 has id 300, the vocabulary ends at 299"):
        TokenShards.open(prepared).verify()


@pytest.mark.parametrize("new_id", ["more", "fewer"])
def test_a_boundary_that_the_offsets_do_not_know_is_found(prepared: Path, new_id: str) -> None:
    def move_boundary(ids: np.ndarray) -> None:
        closings = np.flatnonzero(ids == 0)
        if new_id == "more":
            ids[closings[1] - 2] = 0
        else:
            ids[closings[1]] = 5

    path = forge_shard(prepared, move_boundary)
    with pytest.raises(DataError, match=f"{path}: end-of-text tokens do not stand where documents end"):
        TokenShards.open(prepared).verify()


def test_every_id_fits_its_type() -> None:
    for vocab_size in (257, 65_535, 65_536, 65_537, 200_000):
        largest = np.array(vocab_size - 1)
        assert largest.astype(token_dtype(vocab_size)) == largest
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_opening_maps_files_without_reading_them(prepared: Path) -> None:
    record = read_index(prepared).splits["train"]
    size = 2**36  # a sparse file of 64 GiB: reading it would take a minute
    path = prepared / record.shards[0].file
    with path.open("r+b") as file:
        file.truncate(size)
    offsets = np.fromfile(prepared / record.offsets.file, "<i8")
    added = size // 2 - record.shards[0].tokens
    offsets[record.shards[0].documents :] += added
    offsets.tofile(prepared / record.offsets.file)

    def claim(body: dict[str, Any]) -> None:
        body["splits"]["train"]["tokens"] += added
        body["splits"]["train"]["shards"][0]["tokens"] += added

    rewrite_index(prepared, claim)
    shards = TokenShards.open(prepared)
    assert shards.num_tokens == record.tokens + added
    assert len(shards.document(record.shards[0].documents - 1)) > 2**34
