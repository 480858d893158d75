import pytest

from switchmamba.config import validate
from switchmamba.data.config import DataConfig
from switchmamba.errors import ConfigError


def test_documents_are_separate_unless_said_otherwise() -> None:
    assert validate(DataConfig, {"context_length": 256}, "test").reset_state is True


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"context_length": 0}, "context_length = 0"),
        ({"context_length": 8, "reset_sate": True}, "unknown key reset_sate; did you mean reset_state"),
        ({}, "context_length is missing"),
    ],
)
def test_an_impossible_table_is_refused_by_field(tables: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, tables, "test")
