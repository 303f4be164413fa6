# Every target does its own set-up: a machine with Python 3.11 or newer, pip and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install serve demo test test-slow lint bench train clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, or name one: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $(VENV)/.installed-demo $@

serve: install
	$(BIN)/creative-upscaler serve $(ARGS)

demo: $(VENV)/.installed-demo
	$(BIN)/python -m server.demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not weights' $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.png
	$(BIN)/python -m benchmarks.tiling
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.polling

train: install
	$(BIN)/python -m weights.pocket.train all

clean:
	rm -rf build demo .pytest_cache .ruff_cache .mypy_cache
