# Works from a fresh clone with make and Python 3.10 or newer; everything else is installed into .venv.
#
#   make demo                train a small DeepSeek-V3 from random weights and print its receipt
#   make test                every check (style, types, floors, tests), under 15 minutes on 2 cores
#   make proof [PART=name]   the long evidence of one part, or of all; rewrites the tables in docs
#   make lint | native | wheel | tables | clean
#
# PYTHON=python3.12 picks another interpreter, VENV=folder another environment (an existing one is used as it is).
# TORCH='...' is what to install where torch is absent; an installed torch is never replaced.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test lint native proof tables wheel clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.fireflyer-core
	@$(BIN)/fireflyer demo

test: lint $(VENV)/.fireflyer-native
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

lint: $(VENV)/.fireflyer-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo

proof: $(VENV)/.fireflyer-dev $(VENV)/.fireflyer-native
	@$(BIN)/python -m benchmarks $(PART)

tables: $(VENV)/.fireflyer-dev
	@$(BIN)/python -m benchmarks --tables

wheel: $(VENV)/.fireflyer-dev
	@$(BIN)/python -m hatchling build -t wheel

$(VENV)/.fireflyer-core $(VENV)/.fireflyer-dev: pyproject.toml scripts/install.sh
	@PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH='$(TORCH)' sh scripts/install.sh $(patsubst .fireflyer-%,%,$(@F))

native: $(VENV)/.fireflyer-dev
	@$(BIN)/python hatch_build.py

NATIVE_SOURCES := hatch_build.py $(wildcard src/fireflyer/numerics/native/*.[ch])

$(VENV)/.fireflyer-native: $(VENV)/.fireflyer-dev $(NATIVE_SOURCES)
	@$(BIN)/python hatch_build.py
	@touch $@

clean:
	rm -f src/fireflyer/numerics/native/*.so
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
