# Every target makes .venv from the lock by itself. `make demo` is the whole story; `make test` proves it.
#
#   make CUDA=1 …             also install the CUDA libraries that torch's GPU build needs
#   make PYTHON=python3.12 …  another interpreter, 3.11 or newer

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo yes),$(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed$(if $(CUDA),-cuda)

# torch first and by itself: asked without hashes, pip takes the CPU build where it is offered one, also from a folder
# of wheels; then its hash is checked. (With hashes, pip would always prefer the index, whose build is for GPUs.)
define TAKE_CPU_TORCH
sed -n '/^torch==/,/[^\\]$$/p' requirements.lock > $(VENV)/torch.lock
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/wheels torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index --find-links $(VENV)/wheels --require-hashes -r $(VENV)/torch.lock
	rm -rf $(VENV)/wheels
endef

.PHONY: demo install test gate long check lint bench lock clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/cloister demo

install: $(STAMP)

# What a change must pass (tools/suite.py): the gate, then the story, with real clusters, databases and providers.
test: $(STAMP)
	$(BIN)/python tools/suite.py gate story

gate: $(STAMP)
	$(BIN)/python tools/suite.py gate

# Kills, every fault, fuzzing: before an issue is closed, or a version is released.
long: $(STAMP)
	CLOISTER_EVERY_FAULT=1 $(BIN)/python tools/suite.py long

# What continuous integration does with HEAD, in a clone of it. On success, .git/checked has the commit's id.
check:
	tools/check.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

lock: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/python tools/lock.py

$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer"; echo "hint:  install one, or name it: make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(CUDA),,$(TAKE_CPU_TORCH))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock $(if $(CUDA),-r requirements-cuda.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "error: torch does not load: pip found its GPU build here"; echo "hint:  make CUDA=1, or let pip find a CPU build of torch 2.13.0 (see README, Installing)"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
