#!/usr/bin/env bash
# Writes requirements.lock: exact versions with hashes, for every platform and Python, without addresses; needs `uv`.
set -euo pipefail
cd "$(dirname "$0")/.."
{
    cat requirements.in
    "${PYTHON:-python3}" - <<'PY'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
print("\n".join(line for line in wanted if not line.startswith("torch")))
PY
} | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url - --output-file requirements.lock
