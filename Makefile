# Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3.11
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
BENCH := .venv/.bench
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test lint bench soak clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv with everything pinned in constraints.txt (done once)

# torch and setuptools come first: whatever follows finds them there and asks for no other build.
$(READY): pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time takes a few minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable '.[test,lint]'
	@touch $@

train: $(READY) ## Train a small language model; ARGS="--help" lists the options
	@$(BIN)/python jobs/language_model.py $(ARGS)

test: $(READY) ## Run the tests, three files at a time; ARGS go to pytest
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## Check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy ray_dnn jobs

$(BENCH): $(READY)
	@$(PIP) --no-build-isolation --editable '.[bench]'
	@touch $@

bench: $(BENCH) ## Run the benchmarks; ARGS choose which, "--write" publishes the last results
	@$(BIN)/python -m benchmarks $(ARGS)

soak: $(READY) ## Strike at training runs until something breaks; ARGS="--faults 300", "--help"
	@$(BIN)/python -m benchmarks.soak $(ARGS)

clean: ## Remove .venv and everything else that was generated
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
