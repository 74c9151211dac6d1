# make demo | test | test-all | lint | bench. Each does all of its set-up: Python 3.11+, make and a C++ compiler are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-wheel test-all test-faults lint docs bench bench-peers constraints clean

help:
	@echo "make demo   install, then pretrain, evaluate, export and report a small masked autoencoder (about 5 minutes)"
	@echo "make test   install, then run the default test suite (about 20 minutes on two cores)"
	@echo "make test-all   install, then the default suite and all slow tests but the fault suite's"
	@echo "make test-wheel   build wheel and sdist, and use the wheel alone: examples, and from packing to a report"
	@echo "make test-faults   install, then kill real runs at random moments (about an hour on two cores)"
	@echo "make lint   install, then ruff, mypy and the import contracts"
	@echo "make docs   install, then build the documentation into site/"
	@echo "make bench  install, then the benchmarks of the loader and of the training step"
	@echo "make bench-peers   the loader beside litdata and mosaicml-streaming, in an environment of their own"

# One environment for all targets; made again when the dependencies change. Bytecode is compiled once, here: where
# PYTHONDONTWRITEBYTECODE is set, every process would compile torch anew, which takes longer than most tests.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python tools/demo.py

# Two workers, each with one thread; the files of the suite are compiled once, also where Python is told to write no bytecode.
WORKERS ?= 2
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS)

test: $(BIN)/.installed
	$(PYTEST)

test-slow: $(BIN)/.installed
	$(PYTEST) -m slow --ignore=tests/faults

test-wheel: $(BIN)/.installed
	$(PYTEST) -n 0 -m slow tests/test_examples.py

test-all: test test-slow

test-faults: $(BIN)/.installed
	$(BIN)/python -m pytest tests/faults -m slow

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Warnings are errors. The variable leaves out a notice that Material prints at each start and that is no warning of the build:
# it is maintained until May 2027; its makers' successor is Zensical, which is to read the same mkdocs.yml.
docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BIN)/.installed
	$(BIN)/python tools/bench_data.py
	$(BIN)/python tools/bench_step.py

# mosaicml-streaming asks for older packages than the rest of the development environment.
bench-peers: $(BIN)/.installed
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(BIN)/uv pip install --quiet --python .venv-peers/bin/python --editable '.[peers]'
	.venv-peers/bin/python tools/bench_data.py

constraints: $(BIN)/.installed
	$(BIN)/uv pip freeze --quiet --exclude-editable --python $(BIN)/python > constraints.txt

clean:
	rm -rf $(VENV) .venv-peers build dist site *.egg-info
