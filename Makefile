# make quickstart   the whole way once, on a CPU, in about ten minutes
# make test         all tests of the default run
# make test-slow    the tests marked slow
# make check        linter and type checker
# Everything is installed into .venv by itself.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Test processes side by side; each computes on one thread and takes about 1.3 GB.
JOBS ?= 2

.PHONY: quickstart test test-slow check format install clean

quickstart: $(VENV)/.user
	$(BIN)/fastgrad quickstart $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .

install: $(VENV)/.dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fastgrad needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,plots]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt tests/oracles.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,plots,test,bench,loops,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/oracles.txt
	@touch $@ $(VENV)/.user

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache quickstart-out
