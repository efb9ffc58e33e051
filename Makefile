# The same words for people and for CI. Everything lives in $(VENV); nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help run test test-all check bench clean

help:
	@echo "make run       set up, then answer a prompt with a small model"
	@echo "make test      set up, then the tests (minutes)"
	@echo "make test-all  also the long tests, the sanitizers and other processors"
	@echo "make check     ruff and mypy --strict"
	@echo "make bench     measure, and compare with peers"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# torch comes first and by its exact version: a range would let another package pull a build with a GPU's libraries.
$(VENV)/.installed-dev: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

run: $(VENV)/.installed
	@test -d build/random-tiny || $(BIN)/ossia checkpoint new build/random-tiny --shape tiny
	$(BIN)/ossia generate "What is an ossia?" --model build/random-tiny --max-tokens 48 --seed 1

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/harmony.py
	$(BIN)/python benchmarks/server.py

clean:
	rm -rf build dist $(VENV)
