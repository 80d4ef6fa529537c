# Every target sets up what it needs, from a bare clone: a .venv with the versions of constraints.txt.
# PYTHON (3.11, 3.12 or 3.13) makes the .venv; `make clean` first where one of another version is there.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

# One thread per test process: the cores are shared by WORKERS processes, each of which may start ranks.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DELETE_ON_ERROR:
.PHONY: install quickstart bench bench-kernels lint format test test-slow test-all matrix clean

install: $(INSTALLED)

# torch goes first and by its exact version, so that a CPU wheel that pip is configured to find is taken as it
# is; the build backends go with it, so that pip builds tunesmith and deepspeed (which reads torch's version) from
# the pins, not in an environment apart.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH) hatchling editables setuptools
	$(PIP) --no-build-isolation --editable '.[dev,quickstart,wandb,bitsandbytes,deepspeed,triton]'
	touch $@

# Fine-tunes a real pretrained model on the CPU, in minutes; its run folder, runs/quickstart, is replaced.
quickstart: install
	$(BIN)/tunesmith train configs/quickstart.yaml --overwrite

# Ratios within one run. Kernels: the loss and the optimizers beside torch's, DeepSpeed's and bitsandbytes'. Then a step
# beside a plain loop's and transformers.Trainer's; on two processes, under each engine beside bare DDP, fully_shard and
# DeepSpeed; and a language model of 100 M parameters beside Trainer's (and TRL's: --trl-python).
bench: install bench-kernels
	OMP_WAIT_POLICY=passive $(BIN)/python bench/step_time.py
	$(BIN)/python bench/engine_time.py --parts
	$(BIN)/python bench/language_model.py

bench-kernels: install
	$(BIN)/python bench/kernels_linear_cross_entropy.py
	$(BIN)/python bench/kernels_distillation.py
	$(BIN)/python bench/kernels_adamw.py --deepspeed
	$(BIN)/python bench/kernels_adamw8bit.py

# On a machine with a GPU, in under ten minutes: parity, memory and ratios of the kernels, into kernels/results. Without
# the .venv: PYTHON is one that has torch and triton. GPU_CHECK: options of bench/gpu_check.py, such as --status.
.PHONY: gpu-check
gpu-check:
	$(PYTHON) bench/gpu_check.py $(GPU_CHECK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file's tests stay in one process, which may keep a pool of ranks for them.
test: install
	$(PYTEST) -m 'not slow'

test-slow: install
	$(PYTEST) -m slow

test-all: install
	$(PYTEST)

# What works on every model, objective and engine, into docs/adapters-matrix.* and docs/strategies-matrix.*: a fixed
# part of both is in the tests. MATRIX="strategies ema" runs those of one whose names hold the words.
matrix: install
	for matrix in $(if $(MATRIX),"$(MATRIX)",adapters strategies); do \
	  OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.matrix $$matrix || exit 1; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache
