# `make demo` and `make test` need Python >= 3.10 and make, nothing else: they set up .venv as a user would, with pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Files of tests that run beside each other; one of them may start four processes, which wait for
# each other a lot. tests/conftest.py begins with the files that take longest.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-large lint faults properties asan kernels gpu day soak test-matrix clean

demo: $(VENV)/.demo
	$(BIN)/weyl-megatron demo

# What a change can break.
test: lint
	WEYL_MEGATRON_EXAMPLES=200 $(PYTEST) $(PARALLEL) -m "not slow and not demo and not large"

DRAWN := tests/faults/test_properties.py tests/day

# The rest, on ranks that torchrun starts one by one, as a user's are; five times as many drawn
# layouts and days.
test-all: $(VENV)/.dev
	$(PYTEST) -m alone
	WEYL_MEGATRON_TORCHRUN=1 $(PYTEST) $(PARALLEL) -m "(slow or demo) and not large and not alone"
	WEYL_MEGATRON_EXAMPLES=1000 $(PYTEST) $(PARALLEL) -m "not slow" $(DRAWN)

# One real step of the largest recipes; up to 24 GiB.
test-large: $(VENV)/.dev
	$(BIN)/python -m pytest -q -s -m large

# What a run may meet, and what becomes of it, as a table; docs/faults.md is the last one.
FAULTS := tests/faults tests/day tests/test_nonfinite.py tests/engines/megatron/test_nonfinite.py \
	tests/engines/megatron/test_checkpoints.py

faults: $(VENV)/.dev
	$(PYTEST) $(PARALLEL) -m "not large" $(FAULTS) --faults docs/faults.md

# Ten times as many drawn layouts as `make test-all`.
properties: $(VENV)/.dev
	WEYL_MEGATRON_EXAMPLES=10000 $(PYTEST) tests/faults/test_properties.py

# The C++ kernel under AddressSanitizer and UBSan: its own tests, and the optimizer's, which call it.
ASAN_TESTS := tests/kernels tests/test_optimizer.py tests/test_state_dict.py tests/test_state.py

asan: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.sanitizers -q $(PARALLEL) $(ASAN_TESTS) \
		-k "not every_kernel_passes and not others_may_write and not host_s_time"

# Triton's kernels for an A100, an H100 and a B200, which need not be there: what they take, and their code.
kernels: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compile_kernels --arch 80 90 100 --widths 4 8 16

# The acceptance run for one GPU, at most 8 minutes; docs/gpu.md says what is in it. Without a GPU:
# make gpu GPU="--device cpu --tiny".
gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu $(GPU)

# Twenty thousand drawn days of a user, a thousand of which `make test-all` draws.
day: $(VENV)/.dev
	WEYL_MEGATRON_EXAMPLES=20000 $(PYTEST) -rA tests/day

soak: $(VENV)/.dev
	$(BIN)/python -m tests.faults.soak

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

# Every DeepSpeed that is supported, each with a torch of its time; the first pair is the oldest of both. numpy 2.4 refuses
# what the interpreters of Triton before 3.7 do.
MATRIX := 0.16.9+2.5.0 0.18.9+2.9.1

# Every megatron-core likewise, beside the newest that suits PYTHON, which `make test` runs. 0.18 needs Python 3.12.
MEGATRON := 0.14.0+2.6.0 0.18.2+2.9.1 0.19.2+2.9.1
PYTHON312 ?= python3.12

# What torch itself spreads: meshes, pipelines, experts. The oldest, those that rows of docs/fsdp2.md begin with, the first
# that needs no stand-in of tests/fsdp2.py, and the newest but that of `make test`.
TORCHES := 2.5.1 2.6.0 2.7.1 2.8.0 2.9.1 2.13.0
MESHES := $(addprefix tests/engines/torch/test_,mesh.py mesh_nonfinite.py experts.py pipelining.py dcp.py) \
	tests/watch/test_mesh.py tests/transformer/test_mesh.py

test-matrix: test $(MATRIX:%=matrix-%) $(MEGATRON:%=megatron-%) $(TORCHES:%=meshes-%)

meshes-%:
	test -x .venv-meshes-$*/bin/python || $(PYTHON) -m venv .venv-meshes-$*
	.venv-meshes-$*/bin/python -m pip install --quiet --disable-pip-version-check pytest hypothesis pyyaml \
		"numpy<2.4" "setuptools<81" torch==$* -e .
	OMP_NUM_THREADS=1 .venv-meshes-$*/bin/python -m pytest -q $(MESHES)

matrix-%:
	$(MAKE) VENV=.venv-$* DEEPSPEED=$(firstword $(subst +, ,$*)) TORCH=$(lastword $(subst +, ,$*)) matrix-run

.PHONY: matrix-run
matrix-run:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools<81" wheel "numpy<2.4" torch==$(TORCH)
	$(PIP) pytest hypothesis pyyaml deepspeed==$(DEEPSPEED) -e .
	$(PYTEST) -m "not demo and not large"

megatron-0.14.0+%: MEGATRON_PYTHON = $(PYTHON)
megatron-%: MEGATRON_PYTHON = $(PYTHON312)
megatron-%:
	test -x .venv-megatron-$*/bin/python || $(MEGATRON_PYTHON) -m venv .venv-megatron-$*
	.venv-megatron-$*/bin/python -m pip install --quiet --disable-pip-version-check pytest hypothesis einops \
		torch==$(lastword $(subst +, ,$*)) megatron-core==$(firstword $(subst +, ,$*)) -e ".[examples]"
	OMP_NUM_THREADS=1 .venv-megatron-$*/bin/python -m pytest -q tests/engines/megatron tests/examples tests/patches

# The pages, into out/docs; --strict: a link or an anchor that leads nowhere is an error.
.PHONY: docs
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict --quiet
	@echo "out/docs/index.html; its search needs a server: $(BIN)/python -m http.server -d out/docs"

$(VENV)/.docs: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)/.demo: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo,dev,examples]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-* out build *.egg-info
