# make demo: a LoRA on a small model, before and after.  make test: every test.  make check: what a change must pass.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up

# One thread per worker: toy networks gain nothing from more. Compiled tests are kept for the next worker, whatever the
# environment says. No test may reach the network.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: setup demo test unit family full fast gpu fuzz curves stops lint check wheel lowest format pages site bench clean

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

# Every tier that needs no GPU, in one run.
test: setup
	@$(PYTEST) -q -n $(JOBS) -m "not gpu"

# Tiers: unit (no model is built or trained), family (toy models), full (what takes longer). `fast` is the first two.
unit: setup
	@$(PYTEST) -q -n $(JOBS) -m "not family and not full and not gpu"

family: setup
	@$(PYTEST) -q -n $(JOBS) -m "family and not gpu"

full: setup
	@$(PYTEST) -q -n $(JOBS) -m "full and not gpu"

fast: setup
	@$(PYTEST) -q -n $(JOBS)

# For one CUDA device, under 8 minutes: results are lines of JSON in build/gpu/. Without a device every test skips.
gpu: setup
	@$(PYTEST) -q -m gpu tests/gpu

# Format, lint and types.
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint fast

# The wheel, installed without extras into an environment of its own, and commands run from it.
wheel: setup
	@PYTHON=$(PYTHON) TORCH="$(TORCH)" bash .ci/wheel

# The family tier with the lowest versions of our dependencies that pyproject.toml allows (torch excepted).
lowest: setup
	@PYTHON=$(PYTHON) TORCH="$(TORCH)" JOBS=$(JOBS) bash .ci/lowest

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Damaged inputs for every reader of foreign files and texts: INPUTS=200000 of them, a function of SEED.
fuzz: setup
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=src:tests $(BIN)/python -m fuzz --count $(or $(INPUTS),200000) \
		--seed $(or $(SEED),0) --jobs $(JOBS)

# Whether a change moved a number: the stored curves, bit for bit on the machine that made them. WRITE=1 stores them.
curves: setup
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=src:tests $(BIN)/python tests/curves.py $(if $(WRITE),--write)

# Two processes are asked to stop, fail or are killed, each at so many random moments: make stops MOMENTS=40
stops: setup
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=src:tests $(BIN)/python tests/training/stop_moments.py $(or $(MOMENTS),40)

# What is generated from the source: pages of docs/, requirements.txt, the listing of messages.
pages: setup
	$(BIN)/python docs/make_file_map.py
	$(BIN)/python docs/make_messages.py
	$(BIN)/python docs/make_errors.py
	$(BIN)/python docs/make_adapters.py
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_requirements.py
	$(BIN)/python docs/make_sharing.py

# The manual as a site, in build/site; a broken link is an error.
site: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Tables, and the same as JSON in build/bench/. ONLY="training flux" runs these alone. REFERENCE=DIR, a checkout of
# sd-scripts, has it train beside ours (REFERENCE_PYTHON: with another Python).
bench: setup
	@mkdir -p build/bench
	@for b in $(or $(ONLY),$(basename $(notdir $(wildcard benchmarks/*.py)))); do echo "== $$b"; \
		$(BIN)/python benchmarks/$$b.py --json build/bench/$$b.json || exit 1; done
	@$(if $(REFERENCE),$(BIN)/python benchmarks/training.py --json build/bench/reference.json \
		--reference $(REFERENCE) $(if $(REFERENCE_PYTHON),--reference_python $(REFERENCE_PYTHON)))

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
