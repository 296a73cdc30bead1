# make demo   builds the kernels, trains on the embedded set, extracts, scores, writes demo/report.html
# make test   builds and passes the tests            make lint    ruff, mypy, clang-format
# make bench  times the ops beside their peers       make clean   removes what the others made
#
# Each does all its own set-up in .venv and nothing twice. PYTHON=python3.12 uses that interpreter and the torch that it has.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$n)

ifdef PYTHON
CREATE := $(PYTHON) -m venv --system-site-packages
PINS :=
else
CREATE := python3 -m venv
PINS := -c constraints.txt
endif
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

# Both sides of a race keep freed memory: without it eager peers fault their outputs in at every call.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

.PHONY: help demo test test-sanitize bench bench-short bench-report kernels lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

$(VENV)/torch.stamp: constraints.txt
	@echo "[1/3] environment: $(VENV) with torch"
	@test -x $(BIN)/python || $(CREATE) $(VENV)
	@$(PIP) $(PINS) torch torchvision 2> >(grep -v "^WARNING: Location" >&2)
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "[2/3] packages: casm_fast with its test and development extras"
	@$(PIP) $(PINS) setuptools cmake ninja pybind11 2> >(grep -v "^WARNING: Location" >&2)
	@PATH=$(abspath $(BIN)):$$PATH $(PIP) $(PINS) --no-build-isolation -e ".[dev]" 2> >(grep -v "^WARNING: Location" >&2)
	@touch $@ $(VENV)/build.stamp

$(VENV)/build.stamp: $(VENV)/package.stamp $(SOURCES)
	@echo "[3/3] kernels: changed sources are compiled"
	@PATH=$(abspath $(BIN)):$$PATH $(PIP) --no-build-isolation --no-deps -e . 2> >(grep -v "^WARNING: Location" >&2)
	@touch $@

demo: $(VENV)/build.stamp
	@$(BIN)/casm-fast demo

test: $(VENV)/build.stamp
	@$(BIN)/python -m pytest -q -n $(THREADS)

test-sanitize: $(VENV)/build.stamp
	@echo "emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(BIN)/python tests/emulator/sanitize.py

bench: $(VENV)/build.stamp
	@echo "CPU, then CUDA where there is one; results/ gets the JSON"
	@$(KEEP_MEMORY) $(BIN)/python benchmarks/run.py

bench-short: $(VENV)/build.stamp
	@$(KEEP_MEMORY) $(BIN)/python benchmarks/run.py --short

bench-report: $(VENV)/build.stamp
	@$(BIN)/python benchmarks/report.py

kernels: $(VENV)/build.stamp
	@$(BIN)/python benchmarks/kernels.py

lint: $(VENV)/build.stamp
	@echo "ruff, mypy --strict, clang-format"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/emulator/*.cu')

format: $(VENV)/build.stamp
	@$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/emulator/*.cu')

clean:
	@echo "removes .venv, build/, the built libraries, demo/ and caches"
	@rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f casm_fast/*.so
