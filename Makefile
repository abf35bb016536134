# All targets work in .venv, which is made on first use and renewed when pyproject.toml or constraints.txt change.
#   make train ARGS="--seed 1"      more flags for the command
#   make test ARGS="-k pacing"      more flags for pytest
#   make train PYTHON=/opt/python3.12/bin/python3
#   make train PIP_FLAGS="--index-url …"   more flags for pip, e.g. an index that has torch without CUDA
PYTHON ?=
PYTHONS := python3.13 python3.12 python3.11 python3
PIP_FLAGS ?=
ARGS ?=
MINUTES ?= 20
ALGO ?= ppo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help train test long soak lint types bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@python=; for candidate in $(or $(PYTHON),$(PYTHONS)); do \
		if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "no Python 3.11 or newer with venv and pip among: $(or $(PYTHON),$(PYTHONS))" >&2; \
		echo "  install one (on Debian and Ubuntu also python3-venv), or say: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)  ## install, then train PPO on CartPole-v1
	$(BIN)/python -m aiorl train CartPole-v1 $(ARGS)

test: $(READY)  ## install, then run the quick tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

long: $(READY)  ## run the long tests (learning results, many processes)
	$(BIN)/python -m pytest -m long -o faulthandler_timeout=7200 $(ARGS)

soak: $(READY)  ## train while workers die and the disk is full (MINUTES=20 ALGO=ppo), then check the laws
	$(BIN)/python -m bench.soak --minutes $(MINUTES) --algo $(ALGO) $(ARGS)

lint: $(READY)  ## check style
	$(BIN)/ruff check aiorl tests examples bench

types: $(READY)  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## measure what asynchrony gains and what it costs
	$(BIN)/python -m bench.twin $(ARGS)
	$(BIN)/python -m bench.overhead

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find aiorl tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +
