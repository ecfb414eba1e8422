# make demo: a LoRA on a small model, before and after.  make test: every test.  make check: what a change must pass.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up

# One thread per worker: toy networks gain nothing from more. No test may reach the network.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: setup demo test fast gpu curves check format pages bench clean

setup: $(SETUP)

# torch comes first and is named exactly, so that nothing below it chooses another build.
$(SETUP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name it: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

demo: setup
	$(BIN)/sfumato demo

# The fast tests and the slow ones, in one run.
test: setup
	@$(PYTEST) -q -n $(JOBS) -m "not gpu"

fast: setup
	@$(PYTEST) -q -n $(JOBS)

gpu: setup
	@$(PYTEST) -q -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	@$(PYTEST) -q -n $(JOBS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Whether a change moved a number: the stored curves, bit for bit on the machine that made them. WRITE=1 stores them.
curves: setup
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=src:tests $(BIN)/python tests/curves.py $(if $(WRITE),--write)

# What is generated from the source: the table of files in README.md, the listings of messages and errors.
pages: setup
	$(BIN)/python docs/make_file_map.py
	$(BIN)/python docs/make_messages.py

bench: setup
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
