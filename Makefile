# make demo     see it work, from nothing: .venv, two CPU ranks, killed and resumed, exported (10 minutes)
# make test     everything that can be tested on this machine      make quick   the fast part, 2 minutes
# make check    style, types, import directions                    make fix     mend style where a tool can
# make bench    measure, print figures                             make clean   remove what these commands made
# make test-full   the full products of stages, worlds and splits  make test-gpu   what needs a GPU

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# The folders that the plain test command leaves out (pyproject.toml) are named one by one.
PYTEST_ALONE := $(PYTEST) -o addopts="-q --import-mode=importlib --strict-markers"
# Without an NVIDIA GPU: the CPU build of torch, hundreds of megabytes instead of gigabytes.
CPU_TORCH := $(shell command -v nvidia-smi >/dev/null || echo --extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo quick test check fix bench clean test-full test-gpu

demo: .venv/run.stamp
	$(BIN)/python -m launch.demo

test: .venv/dev.stamp
	@$(BIN)/python tests/needs.py
	$(PYTEST)

quick: .venv/dev.stamp
	$(PYTEST) -m "not slow"

test-full: .venv/dev.stamp
	$(PYTEST_ALONE) tests/full

test-gpu: .venv/dev.stamp
	$(PYTEST_ALONE) tests/gpu

bench: .venv/dev.stamp
	$(PYTEST_ALONE) -s tests/bench

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info data/demo runs/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-deps: only torch itself is looked for on the CPU index; its dependencies come with ours.
.venv/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --retries 2 --no-deps -c constraints.txt $(CPU_TORCH) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[downstream,dev]"
	@touch $@
