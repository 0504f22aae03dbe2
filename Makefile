# One virtual environment, installed from the pins of constraints.txt and installed again only when they change.
#   make fit ARGS="--config configs/cpu.yaml"      make test ARGS="-k losses"      make fit PYTHON=python3.12
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PINS := setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help fit test test-slow test-oldest serve bench bench-gpu lint docs clean

help:
	@echo "make fit        train (the built-in example, or what ARGS says)"
	@echo "make test       lint, types and tests, offline"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-oldest  the tests with the oldest versions that setup.cfg allows, in .venv-oldest"
	@echo "make serve      serve a trained policy"
	@echo "make bench      every benchmark under benchmarks/, on the CPU"
	@echo "make bench-gpu  a training step against TRL on one CUDA device"
	@echo "make lint       ruff and mypy alone"
	@echo "make docs       the pages of docs/ as a site, in docs/_build"
	@echo "make clean      remove caches and build leftovers (keeps .venv and runs/)"

# A stamp for each set of extras; a larger set also satisfies the smaller ones.
$(VENV)/.stamp-fit: EXTRAS :=
$(VENV)/.stamp-fit: COVERS := fit
$(VENV)/.stamp-serve: EXTRAS := [serve]
$(VENV)/.stamp-serve: COVERS := fit serve
$(VENV)/.stamp-test: EXTRAS := [test,peers,serve,lora,report,docs]
$(VENV)/.stamp-test: COVERS := fit serve docs test

$(VENV)/.stamp-docs: EXTRAS := [docs,report]
$(VENV)/.stamp-docs: COVERS := fit docs

$(VENV)/.stamp-%: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".$(EXTRAS)"
	@touch $(COVERS:%=$(VENV)/.stamp-%)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1);" \
	    "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

fit: $(VENV)/.stamp-fit
	$(BIN)/python train.py fit $(ARGS)

serve: $(VENV)/.stamp-serve
	$(BIN)/python serve.py $(ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Several workers share the cores, so each computes with one thread.
test test-slow: export OMP_NUM_THREADS ?= 1
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export WANDB_MODE := offline

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --ignore tests/serving/test_page.py $(ARGS)
	# The browser afterwards, alone: what a person sees in time should not hang on other tests. (5: ARGS chose none of it)
	$(BIN)/python -m pytest tests/serving/test_page.py $(ARGS) || [ $$? -eq 5 ]

test-slow: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

# The oldest that the project promises to work with; TRL, which needs newer ones, is not installed and its tests skip.
test-oldest: export OMP_NUM_THREADS ?= 1
test-oldest: export HF_HUB_OFFLINE := 1
test-oldest: export WANDB_MODE := offline
test-oldest: .venv-oldest/.stamp
	.venv-oldest/bin/python -m pytest -n $(WORKERS) tests/data tests/losses tests/models tests/training $(ARGS)

.venv-oldest/.stamp: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[test,serve,lora]"
	@touch $@

# Every warning is an error, such as a link to a page or heading that is not there.
docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "Open docs/_build/index.html"

bench: $(VENV)/.stamp-test
	@set -e; for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

bench-gpu: $(VENV)/.stamp-test
	$(BIN)/python benchmarks/training.py --device cuda $(ARGS)

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
