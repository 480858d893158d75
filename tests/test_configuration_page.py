"""``docs/configuration.md`` lists every key of every table with its default, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from switchmamba.config import Config
from switchmamba.data.config import DataConfig
from switchmamba.layers import AnyLayerConfig
from switchmamba.layers.routing import AnyRouterConfig
from switchmamba.models.config import ModelConfig
from switchmamba.training.config import CHANGEABLE_ON_RESUME, TrainingConfig

PAGE = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
LAYERS: tuple[type[Config], ...] = get_args(get_args(AnyLayerConfig)[0])
ROUTERS: tuple[type[Config], ...] = get_args(get_args(AnyRouterConfig)[0])
TABLES: dict[str, type[Config]] = {
    "`[model]`": ModelConfig,
    **{f'`[model.layers.NAME]`, `kind = "{c.model_fields["kind"].default}"`': c for c in LAYERS},
    **{f'`[model.layers.NAME.router]`, `kind = "{c.model_fields["kind"].default}"`': c for c in ROUTERS},
    "`[data]`": DataConfig,
    "`[training]`": TrainingConfig,
}


def written(value: Any) -> str:
    """Write a default as the page does: as TOML, null as none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Config):
        fields = ", ".join(f"{name} = {json.dumps(field)}" for name, field in value.model_dump().items())
        return f"{{ {fields} }}"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def default(field: FieldInfo) -> str:
    return "–" if field.is_required() else f"`{written(field.get_default(call_default_factory=True))}`"


def test_the_page_has_a_section_for_every_table():
    assert re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE) == list(TABLES)


@pytest.mark.parametrize("heading", list(TABLES))
def test_every_key_stands_on_the_page_with_its_default(heading):
    assert f"## {heading}\n" in PAGE, f"docs/configuration.md lacks the section: ## {heading}"
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| \S.* \|$", section, flags=re.MULTILINE)
    fields = {name: field for name, field in TABLES[heading].model_fields.items() if name != "kind"}
    assert rows == [(name, default(field)) for name, field in fields.items()]


def test_the_page_names_what_a_resumed_run_may_change():
    sentence = PAGE.split("A resumed run may change ")[1].split(";")[0]
    assert {f"training.{name}" for name in re.findall(r"`(\w+)`", sentence)} == CHANGEABLE_ON_RESUME
