"""The documents of the local tasks, from the file beside this one."""

import json
from pathlib import Path

from datasets import Dataset


def documents(file: str, **_: object) -> dict[str, Dataset]:
    """Return the one split of ``file``."""
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
