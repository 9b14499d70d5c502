# make demo     see it work, from nothing: .venv, two CPU ranks, killed and resumed, exported (10 minutes)
# make test     everything that can be tested on this machine      make quick   the fast part, 2 minutes
# make check    style, types, import directions                    make fix     mend style where a tool can
# make bench    measure, print figures                             make clean   remove what these commands made
# make test-full   the full products of stages, worlds and splits  make test-gpu   what needs a GPU
# make soak     kill a run a hundred times at random moments

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
TWO_WORKERS := -n 2 --dist loadscope --no-loadscope-reorder
# The folders that the plain test command leaves out (pyproject.toml) are named one by one.
PYTEST_ALONE := $(PYTEST) -o addopts="-q --import-mode=importlib --strict-markers"

.PHONY: demo quick test check fix bench clean test-full test-gpu soak

demo: .venv/run.stamp
	$(BIN)/python -m launch.demo

test: .venv/dev.stamp
	@$(BIN)/python tests/needs.py
	$(PYTEST) $(TWO_WORKERS)

quick: .venv/dev.stamp
	$(PYTEST) $(TWO_WORKERS) -m "not slow"

test-full: .venv/dev.stamp
	$(PYTEST_ALONE) tests/full

# KILLS: how often the run is killed before it may finish.
KILLS ?= 100
soak: .venv/dev.stamp
	$(BIN)/python tests/soak.py --kills $(KILLS)

test-gpu: .venv/dev.stamp
	$(PYTEST_ALONE) tests/gpu

# DATA: a packed folder of a few hundred samples; with FILMS (a folder of videos), other loaders beside ours too.
DATA ?=
FILMS ?=
bench: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python tests/bench/bench_order.py
	$(BIN)/python tests/bench/simulate_requests.py
	$(BIN)/python tests/bench/bench_save.py
	$(if $(DATA),$(BIN)/python tests/bench/bench_memory.py $(DATA))
	$(if $(DATA),$(BIN)/python tests/bench/bench_s3.py $(DATA) --parts start delay bytes faults)
	$(if $(FILMS),$(BIN)/python tests/bench/bench_clip.py $(FILMS))
	$(if $(FILMS),$(BIN)/python tests/bench/bench_peers.py $(FILMS))

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fix: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info data/demo runs/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and pinned: whatever asks for it later finds it there. Who wants its CPU build on a machine without a GPU
# tells pip so in the usual way (PIP_EXTRA_INDEX_URL, or a wheel in PIP_FIND_LINKS).
.venv/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[downstream,dev]"
	@touch $@
