# `make demo` and `make test` need Python >= 3.10 and make, nothing else: they set up .venv as a user would, with pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint test-matrix clean

demo: $(VENV)/.demo
	$(BIN)/weyl-megatron demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

# Every DeepSpeed that is supported, each with a torch of its time; the first pair is the oldest of both.
MATRIX := 0.16.9+2.5.0 0.18.9+2.9.1

test-matrix: test $(MATRIX:%=matrix-%)

matrix-%:
	$(MAKE) VENV=.venv-$* DEEPSPEED=$(firstword $(subst +, ,$*)) TORCH=$(lastword $(subst +, ,$*)) matrix-run

.PHONY: matrix-run
matrix-run:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools<81" wheel numpy torch==$(TORCH)
	$(PIP) pytest hypothesis deepspeed==$(DEEPSPEED) -e .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not demo"

$(VENV)/.demo: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo,dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-* out build *.egg-info
