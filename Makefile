# Every target does its own set-up: a machine with Python 3.11 or newer, pip and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install dependencies serve demo test test-slow lint bench train clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed  ## everything that the server needs, into .venv; the other targets do it by themselves

# Apart from `install` for the container image, whose layer of libraries outlives a change of the code.
dependencies: $(VENV)/.dependencies

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, or name one: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.dependencies: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing what the server needs into $(VENV): torch is large, the first time takes minutes."
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > $(VENV)/dependencies.txt
	$(PIP) --requirement $(VENV)/dependencies.txt
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $(VENV)/.installed-demo $@

serve: install  ## start the server; options: make serve ARGS="--port 9000"
	$(BIN)/creative-upscaler serve $(ARGS)

demo: $(VENV)/.installed-demo  ## upscale one photograph through fal's client, with a server of its own
	$(BIN)/python -m server.demo

test: $(VENV)/.installed-test  ## what has to pass before a change lands; one file: make test ARGS=tests/test_layout.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not weights' $(ARGS)

test-slow: $(VENV)/.installed-test  ## everything
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test  ## the figures of the README
	$(BIN)/python -m benchmarks.png
	$(BIN)/python -m benchmarks.tiling
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.polling

train: install  ## train the pocket weights again, for hours
	$(BIN)/python -m weights.pocket.train all

clean:  ## remove what tests and tools left
	rm -rf build demo .pytest_cache .ruff_cache .mypy_cache
