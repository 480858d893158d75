#!/usr/bin/env bash
# Makes .venv with everything at the versions and hashes of requirements.lock, and switchmamba itself, editable.
#
# torch comes from the first of these that serves:
#   1. an importable torch of the right version (the environment then sees the system's packages);
#   2. $TORCH_INDEX_URL, if set: pip's index for torch;
#   3. where there is no NVIDIA GPU, a CPU build ("+cpu") that pip can find, such as a wheel on disk;
#   4. pip's own index.
set -euo pipefail
cd "$(dirname "$0")/.."
TORCH_PIN=2.13.0
TORCH_OK='import torch; v = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]); raise SystemExit(v < (2, 11))'
PYTHON=${PYTHON:-python3}

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$PYTHON" --version 2>&1 || true): switchmamba needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2
    exit 2
}
options=()
"$PYTHON" -c "$TORCH_OK" 2>/dev/null && { say "using the torch of $("$PYTHON" -c 'import sys; print(sys.executable)')"; options=(--system-site-packages); }
say "making .venv"
"$PYTHON" -m venv "${options[@]}" .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)

say "installing the locked dependencies"
"${pip[@]}" install --require-hashes --requirement requirements.lock

if ! .venv/bin/python -c "$TORCH_OK" 2>/dev/null; then
    say "installing torch $TORCH_PIN"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        "${pip[@]}" install --index-url "$TORCH_INDEX_URL" "torch==$TORCH_PIN"
    elif command -v nvidia-smi >/dev/null || [ "$(uname -s)" = Darwin ]; then
        "${pip[@]}" install "torch==$TORCH_PIN"
    else
        "${pip[@]}" install "torch==$TORCH_PIN+cpu" 2>/dev/null || {
            say "no CPU build of torch found: taking the default one (large; set TORCH_INDEX_URL to avoid it, see README)"
            "${pip[@]}" install "torch==$TORCH_PIN"
        }
    fi
fi
"${pip[@]}" install --no-deps --no-build-isolation --editable .
touch .venv/ready
say "ready: . .venv/bin/activate && switchmamba --help"
