# Four verbs and a benchmark. A fresh clone needs Python 3.11+, git, make and pip; everything else comes from PyPI.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
# Wheel folders given to pip (split by spaces) are given to uv (split by commas) too.
empty :=
comma := ,
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
# Without wheel folders, torch comes from PyTorch's index for CPUs: UV_TORCH_BACKEND=auto (or cu130, ...) for GPUs.
ifeq ($(UV_FIND_LINKS),)
export UV_TORCH_BACKEND ?= cpu
endif
# An activated environment is not the one to install into.
unexport VIRTUAL_ENV

UV := $(firstword $(shell command -v uv) .uv/bin/uv)
BIN := .venv/bin
PLAN ?= examples/demo.yaml
TESTS ?= tests

.PHONY: help setup check test demo bench clean

help: ## show the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-6s %s\n", $$1, $$2}'

setup: .venv/.dev ## create .venv with everything that development needs
	@echo 'ready: source .venv/bin/activate'

check: .venv/.dev ## validate everything at once: Python, shell, YAML, plans, Dockerfiles, JavaScript
	@bash .ci/check

test: .venv/.dev ## run the tests (TESTS="tests/test_x.py -k y" for some of them)
	$(BIN)/pytest $(TESTS)

demo: .venv/.base ## run examples/demo.yaml (PLAN=... for another plan)
	$(BIN)/orchestrate $(PLAN)

bench: .venv/.base ## measure against the Temporal floor and the peers (BENCH="--quick" for a smoke test)
	$(BIN)/python bench/run.py --uv "$$(command -v $(UV))" $(BENCH)

clean: ## remove what make created
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# pip's --target works without venv and on interpreters that the distribution manages.
.uv/bin/uv:
	@echo 'getting uv from PyPI'
	@$(PYTHON) -m pip install --quiet --root-user-action ignore --disable-pip-version-check --no-warn-script-location --target .uv uv
	@echo '*' > .uv/.gitignore

.venv/pyvenv.cfg: | $(filter .uv/bin/uv,$(UV))
	@$(UV) venv --quiet --allow-existing --python-preference system --python '>=3.11,<3.14' .venv

# Plans that make environments of their own find uv beside orchestrate.
.venv/.base: pyproject.toml .venv/pyvenv.cfg
	@echo 'installing into .venv'
	@$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode uv --editable .
	@touch $@

.venv/.dev: pyproject.toml .venv/pyvenv.cfg
	@echo 'installing into .venv, with what development needs'
	@$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode uv --editable '.[dev]'
	@touch $@ .venv/.base
