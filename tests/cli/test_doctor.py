"""``switchmamba doctor``: what is here, and which backend serves each operation."""

import json
from importlib.metadata import version

import pytest

from switchmamba import cli
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
