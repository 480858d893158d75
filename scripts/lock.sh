#!/usr/bin/env bash
# Writes the two locks: exact versions with hashes, for every platform and Python, without addresses; needs `uv`.
#   requirements.lock         the core, its tests
#   requirements-extras.lock  what the extras for other ecosystems need on top: `make test` installs it, `make demo` does not
set -euo pipefail
cd "$(dirname "$0")/.."

# Print the requirements of the given extras, with "core" for the project's own, torch left out.
wanted() {
    "${PYTHON:-python3}" - "$@" <<'PY'
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = {"core": project["dependencies"]} | project["optional-dependencies"]
lines = [line for name in sys.argv[1:] for line in groups[name]]
print("\n".join(line for line in lines if not line.startswith("torch")))
PY
}

lock() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-package torch "$@"
}

{ cat requirements.in; wanted core test; } | lock - --output-file requirements.lock
# torch differs from machine to machine and is there already: nothing of it is locked.
wanted hf lora gguf eval | lock - --constraint requirements.lock --override <(echo "torch ; sys_platform == 'never'") \
    --output-file requirements-extras.lock
