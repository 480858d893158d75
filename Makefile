# make demo      set everything up and run the main job: train MoE-Mamba and Mamba on real text, and compare (≤ 6 minutes)
# make test      set everything up and pass the tests (≤ 15 minutes on 2 cores)
# make help      the rest
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

.PHONY: help setup extras demo check test test-gpu test-slow test-all test-faults experiments-smoke bench-cpu bench-gpu check-gguf lock clean

help:
	@grep -hE '^#   ?|^# make' Makefile | sed 's/^# //'

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh

.venv/extras: .venv/ready requirements-extras.lock
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --require-hashes --requirement requirements-extras.lock
	touch .venv/extras

# make extras    what Hugging Face, LoRA, GGUF and the evaluation harness need, at locked versions
extras: .venv/extras

demo: .venv/ready
	$(BIN)/switchmamba demo --out runs/demo

# make check     ruff and mypy
check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: .venv/extras check
	$(PYTEST) -m "not slow"

# make test-gpu  what needs a CUDA GPU: captured steps, adapters, eight bits, device maps, commands; skipped without one
test-gpu: .venv/extras
	$(BIN)/python -m pytest tests/gpu

# make test-all  the slow tests too: kills, corruption, a short demo, a few steps of every experiment (≤ 60 minutes)
test-all: test test-slow

test-slow: .venv/extras
	$(PYTEST) -m slow

# make experiments-smoke  the small version of every experiment into runs/smoke (about an hour on 2 cores); resumable
SMOKE := runs/smoke
RUN_SMALL := $(BIN)/switchmamba experiment run --small --resume
experiments-smoke: $(SMOKE)/data/text $(SMOKE)/data/induction-heads $(SMOKE)/data/selective-copying
	$(RUN_SMALL) experiments/copying/induction-heads.toml --data $(SMOKE)/data/induction-heads --out $(SMOKE)/induction-heads-small
	$(RUN_SMALL) experiments/copying/selective-copying.toml --data $(SMOKE)/data/selective-copying \
	    --out $(SMOKE)/selective-copying-small
	$(RUN_SMALL) experiments/moe-mamba/*.toml experiments/routing/*.toml --data $(SMOKE)/data/text --out $(SMOKE)

$(SMOKE)/data/text: | .venv/ready
	$(BIN)/switchmamba data example --out $@

$(SMOKE)/data/induction-heads: | .venv/ready
	$(BIN)/switchmamba data synthetic induction-heads --length 32 --train-examples 60000 --out $@

$(SMOKE)/data/selective-copying: | .venv/ready
	$(BIN)/switchmamba data synthetic selective-copying --length 16 --data-tokens 4 --vocabulary 8 --train-examples 60000 --out $@

# make bench-cpu training, forward and decode against Hugging Face's Jamba and Mixtral where they are installed
bench-cpu: .venv/ready
	$(BIN)/python -m benchmarks.cpu

# make bench-gpu correctness on a CUDA GPU, then times; refuses to time what is wrong
bench-gpu: .venv/ready
	$(BIN)/python -m benchmarks.gpu_check --out runs/gpu.json

# make check-gguf llama.cpp loads our GGUF files and draws the same tokens; compiles it first, in .venv-llama (minutes)
LLAMA := .venv-llama/bin/python
check-gguf: .venv/extras $(LLAMA)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.interop.llama_cpp_check --python $(LLAMA)

$(LLAMA):
	$(PYTHON) -m venv .venv-llama
	$@ -m pip install "llama-cpp-python>=0.3.36" || (rm -rf .venv-llama; exit 1)

# make test-faults the long fault injection: 1,000 kills, 10,000 corrupted checkpoints, 100 full disks (under an hour)
test-faults: .venv/ready
	$(BIN)/python -m tests.faults.kill --kills 1000
	$(BIN)/python -m tests.faults.corruption --cases 10000
	$(BIN)/python -m tests.faults.disk_full --cases 100

# make lock      resolve requirements.lock anew (needs uv)
lock:
	bash scripts/lock.sh

clean:
	rm -rf .venv .venv-llama
