# What people type. `make demo` and `make test` each work on a fresh machine
# with Python 3.11; everything they create stays inside this directory.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKDIR ?= runs/quickstart

# Libraries keep settings and caches in the home directory unless told.
export KERAS_HOME := $(CURDIR)/.cache/keras
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help setup demo test test-slow lint format clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		expand -t 12

setup: .venv/ready  ## virtual environment with the exact tested versions

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-cache-dir \
		--disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]'
	touch $@

demo: setup  ## pretrain, evaluate and export on the embedded dataset
	$(BIN)/python -m clsa_tf.train --flagfile=configs/quickstart.flags \
		--workdir=$(WORKDIR)
	$(BIN)/python -m export.savedmodel --workdir=$(WORKDIR) \
		--output=$(WORKDIR)/savedmodel
	$(BIN)/python -m clsa_tf.report --workdir=$(WORKDIR)

test: setup  ## the default tests, about 40 minutes on 2 cores
	$(BIN)/python -m pytest -n 2

test-slow: setup  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

lint: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was made here: environment, caches, runs
	rm -rf .venv .cache runs *.egg-info
