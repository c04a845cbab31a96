# Targets for users. `make demo` and `make test` each work on a fresh machine
# with Python 3.11, 3.12 or 3.13 (others: BUILD.md); everything they create
# stays inside this directory. PYTHON=/path/to/python takes that one.

# In order of preference; BUILD.md lists the versions of TensorFlow.
PYTHONS := 3.11 3.13 3.12 3.10 3.9
# Those with TensorFlow 2.21.
TF221_PYTHONS := 3.13 3.12
BIN := .venv/bin
WORKDIR ?= runs/quickstart

# Libraries keep settings and caches in the home directory unless told.
export KERAS_HOME := $(CURDIR)/.cache/keras
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export PYTHON

# Tests for the second stack: code whose results may differ there.
TF221_TESTS := $(addprefix tests/test_,stacks.py versions.py optimizer.py \
	methods.py losses.py losses_cacr.py augment_crop.py augment_strong.py \
	augment_texture.py augment_weak.py checkpoint.py load.py export.py \
	server.py agreement.py)

.PHONY: help setup demo test test-tf221 test-slow lint format wheel clean FORCE

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		expand -t 12

setup: .venv/ready  ## virtual environment with the exact tested versions

PACKAGES := setup.py constraints.txt constraints-tf221.txt environment.sh

# FORCE if the directory exists but is unusable.
stale = $(shell PYTHON='$(2)' ./environment.sh stale $(1))

.venv/ready: $(PACKAGES) $(call stale,.venv,$(PYTHON))
	@./environment.sh make .venv $(PYTHONS)

.venv-tf221/ready: $(PACKAGES) $(call stale,.venv-tf221)
	@PYTHON= ./environment.sh make .venv-tf221 $(TF221_PYTHONS)

demo: setup  ## pretrain, evaluate and export on the embedded dataset
	$(BIN)/python -m clsa_tf.train --flagfile=configs/quickstart.flags \
		--workdir=$(WORKDIR)
	$(BIN)/python -m export.savedmodel --workdir=$(WORKDIR) \
		--output=$(WORKDIR)/savedmodel
	$(BIN)/python -m clsa_tf.report --workdir=$(WORKDIR)

# A file's tests stay in one process, which makes what they share once. The
# order of the files is that of tests/conftest.py.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test: setup  ## the tests to run before a commit: about 7 minutes
	$(BIN)/python $(PYTEST)

test-tf221: setup .venv-tf221/ready  ## TensorFlow 2.21, and both together
	CLSA_TF_OTHER_PYTHON=$(CURDIR)/$(BIN)/python \
		.venv-tf221/bin/python $(PYTEST) $(TF221_TESTS)

# `make test-slow MINUTES=30` leaves out the tests that have not begun by then.
MINUTES ?= 0

test-slow: setup  ## all other tests: about 50 minutes on 2 cores
	$(BIN)/python $(PYTEST) -m slow -rs --minutes=$(MINUTES)

lint: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup  ## dist/clsa_tf-*.whl, for pip install
	rm -rf build
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:  ## remove what was made here: environments, caches, runs
	rm -rf .venv .venv-tf221 .cache runs build dist *.egg-info
