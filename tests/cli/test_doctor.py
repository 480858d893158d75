"""``switchmamba doctor``: what is here, and which backend serves each operation."""

import json
from importlib.metadata import version

import pytest

from switchmamba import cli
from switchmamba.cli import doctor
from switchmamba.ops import operations


def test_every_operation_has_one_chosen_backend_and_a_reason_against_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings["operations"]) == {operation.name for operation in operations()}
    for devices in findings["operations"].values():
        backends = devices["cpu"]
        assert list(backends.values()).count("chosen") == 1
        assert all(backends.values())
    assert findings["versions"]["torch"] == version("torch")
    assert findings["threads"] >= 1


def test_the_table_names_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(operation.name in out for operation in operations())


def test_that_backends_need_a_gpu_is_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    reasons = [row for device in doctor.examine()["operations"].values() for row in device["cpu"].values()]
    needing = [reason for reason in reasons if "needs a CUDA device" in reason]
    assert len(needing) > 10
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("needs a CUDA device") == 1
    assert f"{len(needing)} others" in out


def test_transformers_comes_with_the_extra_that_export_names() -> None:
    assert doctor.EXTRAS["transformers"] == "hf"
