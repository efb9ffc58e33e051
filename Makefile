# The same words for people and for CI. Everything lives in $(VENV); nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Processes that share the tests of `make test`.
WORKERS ?= 2
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help run test test-all sanitize aarch64 check bench nano web clean

help:
	@echo "make run       set up, then let the embedded model think, call python and answer"
	@echo "make test      set up, then the tests (minutes)"
	@echo "make test-all  also the long tests, the sanitizers and other processors"
	@echo "make check     ruff and mypy --strict"
	@echo "make bench     measure, and compare with peers"
	@echo "make nano      make the embedded model from nothing (hours; goes on where it was)"
	@echo "make web       build the chat page from its sources"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[mcp]'
	@touch $@

# torch comes first and by its exact version: a range would let another package pull a build with a GPU's libraries.
$(VENV)/.installed-dev: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

run: $(VENV)/.installed
	printf '%s\n' 'What is 4821 + 937?' 'What is the factorial of 13?' \
	  | $(BIN)/ossia chat --tools python --show-reasoning --effort high --temperature 0

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-all: $(VENV)/.installed-dev sanitize aarch64
	SOAK_SECONDS=900 $(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

# The kernels' own test program under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.
sanitize: $(VENV)/.installed-dev
	for kind in address,undefined thread; do \
	  cmake -S . -B build/sanitize-$$kind -DOSSIA_PYTHON=OFF -DOSSIA_TESTS=ON -DOSSIA_SANITIZE=$$kind && \
	  cmake --build build/sanitize-$$kind --parallel && build/sanitize-$$kind/kernels_test || exit 1; \
	done

# The same on 64-bit Arm, where a cross compiler and qemu's user emulation are installed
# (Debian: g++-aarch64-linux-gnu, qemu-user). "max" is a processor with everything that is emulated.
aarch64:
	@if command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; then \
	  cmake -S . -B build/aarch64 -DOSSIA_PYTHON=OFF -DOSSIA_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && \
	  cmake --build build/aarch64 --parallel && qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/aarch64/kernels_test; \
	else echo "no cross compiler or emulator for aarch64: its kernels were not tested"; fi

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The chat page, from its sources; needs Node 20 or newer.
web:
	cd web && npm ci --no-audit --no-fund && npm run build

# The embedded model, its measurements and its report. What is in build/nano is not made again.
nano: $(VENV)/.installed-dev
	$(BIN)/python -m ossia.train.nano build/nano --docs docs --processes 2
	rm -rf src/ossia/nano && cp -r build/nano/model src/ossia/nano

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/harmony.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/rounding.py
	@test -d build/bench/shape-20b-4 || $(BIN)/ossia checkpoint new build/bench/shape-20b-4 --shape 20b --layers 4
	$(BIN)/python benchmarks/adapters.py --model build/bench/shape-20b-4
	$(BIN)/python benchmarks/drafts.py --model build/bench/shape-20b-4
	$(BIN)/python benchmarks/vs_llamacpp.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/python_tool.py
	$(BIN)/python benchmarks/browser.py

clean:
	rm -rf build dist $(VENV)
