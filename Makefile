# `make train` and `make test` are all that a fresh machine needs; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests on all cores at once, a file by one worker (tests/conftest.py); each worker takes memory for torch.
PARALLEL := -n auto --maxprocesses 8 --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install train test test-all check lint types bench slurm-up slurm-down clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## only the environment, in .venv

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt -e .
	@touch $@

train: install  ## the quickstart: digits, a few minutes on a CPU, ends in a k-NN accuracy
	$(BIN)/python train.py

test: install  ## the tests, without the slow ones
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: install  ## all tests, the slow proofs too
	$(BIN)/python -m pytest $(PARALLEL)

check: lint types test  ## what CI runs, without the slow tests

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy --strict on src/dino
	$(BIN)/mypy --strict src/dino

bench: install  ## this project beside a textbook implementation and lightly, one to two hours on 2 cores; BENCH="step --quick"
	-$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[bench]"
	$(BIN)/python benchmarks/run.py $(BENCH)

slurm-up:  ## a real Slurm of two nodes on this machine, for trying sweeps (Debian: slurmctld slurmd slurm-client munge)
	@tests/slurm/slurm-up.sh >/dev/null
	@echo "Slurm runs; tell your shell:  export SLURM_CONF=$${SLURMLAB_DIR:-/tmp/slurmlab}/slurm.conf"

slurm-down:  ## stop it, with all its jobs
	@tests/slurm/slurm-down.sh

clean:  ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
