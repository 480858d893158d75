"""Presets: configuration files inside the package, by name; and where ``train`` and ``info`` find a configuration."""

import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from switchmamba.config import Tables, nearest, read_toml
from switchmamba.errors import ConfigError


class Presets(Mapping[str, Tables]):
    """All presets: name → the tables ``model``, ``data`` and ``training`` as plain dictionaries, fresh at each access.

    ``presets["moe-mamba-25m"]``, ``list(presets)``, ``name in presets``. An unknown name raises ConfigError (and so
    ValueError) with the nearest one.
    """

    def __getitem__(self, name: str) -> Tables:
        if name not in self:
            raise ConfigError(f"no preset {name!r}{nearest(str(name), list(self))}")
        return tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(
            sorted(
                f.name.removesuffix(".toml") for f in files(__package__).iterdir() if f.name.endswith(".toml")
            )
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


presets = Presets()


def read_tables(source: str) -> Tables:
    """Return the tables of a preset, or of the TOML file that ``source`` names (told apart by ``.toml`` or a slash)."""
    if source.endswith(".toml") or "/" in source:
        return read_toml(Path(source))
    return presets[source]
