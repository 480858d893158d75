"""Examples in documents that tests run: fenced blocks under the comment ``<!-- run by a test -->``."""

import re
from pathlib import Path


def run_by_a_test(document: Path, language: str) -> list[str]:
    """Return the blocks in ``language`` of a document that promise to be run, in its order."""
    fenced = rf"<!-- run by a test -->\n```{language}\n(.*?)```"
    return re.findall(fenced, document.read_text(encoding="utf-8"), flags=re.DOTALL)
