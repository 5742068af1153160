# make demo          install, train on the digits data set, evaluate, and print the path of the page
# make test          install the development extra and run all tests but the slow ones
# make test-slow     run the tests that take minutes each
# make test-notebooks  run all notebooks; make notebooks also stores their outputs
# make docs-check    run every command of README and docs at a small size
# make docs          build the documentation in build/docs
# make bench         run the benchmarks and write the tables of docs/performance.md
# make test-browser  test the comparison page in headless Chromium, if installed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench test test-slow test-notebooks notebooks docs-check docs test-browser setup setup-dev lint format clean

demo: setup
	$(BIN)/python run.py model=ddpm

test: setup-dev
	$(BIN)/python -m pytest

test-slow: setup-dev
	$(BIN)/python -m pytest -m slow -rs

test-notebooks: setup-dev
	$(BIN)/python -m pytest -m notebooks

notebooks: setup-dev
	$(BIN)/python notebooks/build.py

docs-check: setup-dev
	$(BIN)/python -m pytest -m docs

bench: setup-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python run.py task=bench

docs: setup-dev
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

test-browser: setup-dev
	PYTHONPATH=tests:tests/browser $(BIN)/python -m pytest -n0 -rs tests/browser

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"gencompare needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.core

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache
