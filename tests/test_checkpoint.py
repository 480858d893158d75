"""Verified directories: atomic, never overwritten, and no damage of any kind goes unnoticed."""

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from switchmamba import checkpoint
from switchmamba.errors import CheckpointError, SwitchMambaError
from tests.faults.corruption import KINDS, damage


def write_step(directory: Path, step: int, size: int = 3000) -> Path:
    """Write a verified step directory of random bytes and one small tensor file."""
    generator = random.Random(step)
    path = directory / f"step-{step}"
    files = {
        "config.json": json.dumps({"step": step}).encode(),
        "model.safetensors": lambda p: save_file({"w": torch.full((5,), float(step))}, p),
        "optimizer.safetensors": generator.randbytes(size),
        "training.json": json.dumps({"step": step, "loss": generator.random()}).encode(),
    }
    checkpoint.write_directory(path, files, {"step": step})
    return path


def test_what_is_written_verifies_and_keeps_the_extra_fields(tmp_path: Path) -> None:
    path = write_step(tmp_path, 7)
    manifest = checkpoint.verify_directory(path)
    assert manifest.extra == {"step": 7}
    assert set(manifest.files) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert torch.equal(checkpoint.read_tensors(path / "model.safetensors")["w"], torch.full((5,), 7.0))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = write_step(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoint.write_directory(path, {"config.json": b"{}"}, {})
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_step(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        [file.name for file in path.iterdir()], "0o640"
    )


def test_the_step_of_a_checkpoint_is_known_from_its_manifest(tmp_path: Path) -> None:
    assert checkpoint.saved_step(write_step(tmp_path, 7)) == 7
    checkpoint.write_directory(tmp_path / "other", {"config.json": b"{}"}, {})
    assert checkpoint.saved_step(tmp_path / "other") is None


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def explode(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        checkpoint.write_directory(tmp_path / "a", {"config.json": b"{}", "model.safetensors": explode}, {})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_ignored_and_removed_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_step(tmp_path, 1)
    leftover = tmp_path / "step-2.tmp-123-0123abcd"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    foreign = tmp_path / "step-2.tmp"
    foreign.mkdir()
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step-1"
    with caplog.at_level(logging.WARNING, "switchmamba"):
        write_step(tmp_path, 2)
    assert not leftover.exists()
    assert foreign.exists(), "only what a writer of ours left may be removed"
    assert "left by an interrupted write" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_refused_by_file_name_and_the_step_before_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    generator = random.Random(f"damage {kind}")
    for case in range(12):
        run = tmp_path / f"{kind}-{case}"
        good, bad = write_step(run / "checkpoints", 9), write_step(run / "checkpoints", 10, size=9000)
        names = damage(bad, kind, generator)
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.verify_directory(bad)
        assert any(str(bad / name) in str(refusal.value) for name in names)
        assert "\n" not in str(refusal.value)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "switchmamba"):
            assert checkpoint.newest_valid(run) == good
        assert any(str(bad / name) in caplog.text for name in names)


def test_newest_valid_takes_a_run_a_checkpoints_directory_or_a_step(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        write_step(tmp_path / "checkpoints", step)
    newest = tmp_path / "checkpoints" / "step-100"
    assert checkpoint.newest_valid(tmp_path) == newest
    assert checkpoint.newest_valid(tmp_path / "checkpoints") == newest
    assert checkpoint.newest_valid(tmp_path / "checkpoints" / "step-5").name == "step-5"


def test_a_damaged_step_asked_for_by_name_is_not_replaced_by_another(tmp_path: Path) -> None:
    write_step(tmp_path, 1)
    bad = write_step(tmp_path, 2)
    (bad / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json: missing"):
        checkpoint.newest_valid(bad)


def test_without_a_valid_checkpoint_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.newest_valid(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        checkpoint.newest_valid(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint.newest_valid(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint.newest_valid(tmp_path)
    bad = write_step(tmp_path / "checkpoints", 1)
    (bad / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        checkpoint.newest_valid(tmp_path)


class Payload:
    """Unpickling this creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "a.PKL", "last.ckpt", "w.npy", "modeling.py"]
)
@pytest.mark.parametrize("alone", [True, False])
def test_formats_that_execute_code_are_refused_unopened(tmp_path: Path, name: str, alone: bool) -> None:
    import pickle

    payload = pickle.dumps(Payload(tmp_path / "executed"))
    path = tmp_path / "stranger" if alone else write_step(tmp_path, 1)
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(payload)
    for asked in (path, path / name):
        with pytest.raises(CheckpointError, match="can execute code") as refusal:
            checkpoint.newest_valid(asked)
        assert str(path / name) in str(refusal.value)
    with pytest.raises(CheckpointError):
        checkpoint.read_tensors(path / name)
    assert not (tmp_path / "executed").exists()


def test_files_outside_the_directory_and_links_are_refused(tmp_path: Path) -> None:
    for name in ("../x.json", "/etc/passwd", "a/b.json", "", "manifest.json", ".hidden"):
        with pytest.raises(CheckpointError, match="not a plain file name"):
            checkpoint.write_directory(tmp_path / "out", {name: b"{}"}, {})
    path = write_step(tmp_path, 1)
    (path / "config.json").rename(tmp_path / "config.json")
    (path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a regular file"):
        checkpoint.verify_directory(path)


def test_an_unlisted_tensor_file_is_refused_and_a_readme_is_not(tmp_path: Path) -> None:
    path = write_step(tmp_path, 1)
    (path / "README.md").write_text("hello")
    checkpoint.verify_directory(path)
    (path / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.safetensors: not listed"):
        checkpoint.verify_directory(path)


def tensor_file(path: Path, header: object, data: bytes) -> Path:
    """Write a safetensors file with an arbitrary header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "duplicate": (
        b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}",
        "duplicate key",
    ),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "PICKLE"}}, "dtype"),
    "wrong shape": ({"a": {**ENTRY, "shape": [3]}}, "does not fill"),
    "negative": ({"a": {**ENTRY, "shape": [-2]}}, "not lists of sizes"),
    "overflow": ({"a": {**ENTRY, "shape": [2**63, 2]}}, "not lists of sizes"),
    "overlap": ({"a": ENTRY, "b": ENTRY}, "overlap"),
    "gap": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "gap at byte 0"),
    "short": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "describes 4 bytes"),
    "not json": (b"\xff\xfe", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "list": ([], "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_hostile_tensor_header_is_refused(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = tensor_file(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message) as refusal:
        checkpoint.read_tensors(path)
    assert str(path) in str(refusal.value)


def test_a_huge_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header of"):
        checkpoint.check_tensor_file(path)
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**30 + 8)  # sparse
    with pytest.raises(CheckpointError, match="header of"):
        checkpoint.check_tensor_file(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(10, dtype=dtype)
    weight[3] = value
    save_file({"good": torch.ones(2), "bad": weight}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor bad holds NaN or infinity"):
        checkpoint.read_tensors(tmp_path / "model.safetensors")


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    path = write_step(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"manifest\.json: format_version 2"):
        checkpoint.verify_directory(path)


def test_a_full_disk_is_one_clear_error_and_the_old_step_stays(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from switchmamba import checkpoint
from switchmamba.errors import SwitchMambaError
out = Path(sys.argv[1])
checkpoint.write_directory(out / "step-1", {"model.safetensors": bytes(1000)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.write_directory(out / "step-2", {"model.safetensors": bytes(100_000)}, {})
except SwitchMambaError as error:
    assert error.exit_code == 1
    sys.exit(str(error))
"""
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written (File too large)" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    checkpoint.verify_directory(tmp_path / "step-1")


def test_verifying_does_not_import_torch(tmp_path: Path) -> None:
    write_step(tmp_path, 1)
    script = (
        "import sys; from pathlib import Path; from switchmamba.checkpoint import newest_valid;"
        f"newest_valid(Path({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": "src"})


def test_a_removed_directory_is_gone(tmp_path: Path) -> None:
    path = write_step(tmp_path, 1)
    checkpoint.remove_directory(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_not_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SwitchMambaError, match="cannot be written") as failure:
        checkpoint.write_directory(tmp_path / "file" / "step-1", {"config.json": b"{}"}, {})
    assert failure.value.exit_code == 1


def test_tensors_are_read_to_where_torch_would_put_them(tmp_path: Path) -> None:
    kept = {name: torch.randn(size) for name, size in (("a", 3), ("b", 50), ("c", 1), ("d", 17))}
    save_file(kept, tmp_path / "t.safetensors")
    read = checkpoint.read_tensors(tmp_path / "t.safetensors")
    assert {name: tensor.data_ptr() % checkpoint.ALIGNMENT for name, tensor in read.items()} == dict.fromkeys(
        kept, 0
    )
    assert all(torch.equal(read[name], tensor) for name, tensor in kept.items())
