# Each target first creates what it needs in .venv; the stamps .venv/.run and .venv/.dev remember what is installed.
#   PYTHON=python3.12   the Python that makes .venv
#   ARGS="..."          more arguments for the command that the target runs

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile --constraint constraints.txt
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
CODE := $(wildcard src tests benchmarks examples)

# pip's byte-compiling takes half of the set-up time. Without it Python compiles what it imports, and must keep that.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help demo test clients check clean

help:
	@echo 'make demo    train a sparse model and its dense twin, compare them, talk to the sparse one (ARGS="--minutes 2")'
	@echo 'make test    run the tests (ARGS="-k router")'
	@echo "make clients run the tests with other people's programs: lm-evaluation-harness, langchain"
	@echo 'make check   format, lint, types, floors'
	@echo 'make clean   delete .venv, build output and caches; runs/ stays'

demo: .venv/.run
	@$(BIN)/moesaic demo $(ARGS)

test: .venv/.dev
	@$(BIN)/python -m pytest --quiet --numprocesses logical --maxprocesses 4 $(ARGS)

clients: .venv/.dev
	@$(PIP) --editable '.[clients]'
	@$(BIN)/python -m pytest --quiet tests/server/test_clients.py tests/server/test_lm_eval.py tests/server/test_node.py $(ARGS)

check: .venv/.dev
	@$(BIN)/ruff format --check --quiet $(CODE)
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/pyright --warnings
	@PYTHONPATH=src $(BIN)/lint-imports --no-cache --no-logo

clean:
	@rm -rf .venv build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	@find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.venv/.run: $(BUILD_FILES) | $(BIN)/pip
	@echo 'Installing moesaic and its libraries into .venv (once, about a minute) ...'
	@$(PIP) --editable '.[serve]'
	@touch $@

.venv/.dev: $(BUILD_FILES) | $(BIN)/pip
	@echo 'Installing moesaic, its libraries and the development tools into .venv (once, a few minutes) ...'
	@$(PIP) --editable '.[test,check]'
	@touch .venv/.run $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "moesaic needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -m venv .venv
