# Needs only Python >= 3.11 and a package registry; everything else goes into .venv.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
JOBS ?= 2
# Two workers with a thread each; idle threads must not spin on a machine with few cores.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# Container images set it; with it every process compiles all of torch's Python files again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

# uv installs several times faster than pip, but does not read pip's configuration (mirrors, local wheels).
install = echo "Installing $(1) into .venv"; \
	$(BIN)/python -m uv pip install --python $(BIN)/python --system-certs --editable "$(1)" \
	|| { echo "uv did not install it; trying pip"; $(BIN)/python -m pip install --quiet --prefer-binary --editable "$(1)"; }

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-seeds lint format types compare table clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 on PATH; install one, or give make PYTHON=<path>"; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv || echo "uv is not to be had; pip will do"

.venv/installed: pyproject.toml | $(BIN)/python
	@$(call install,.)
	@touch $@

.venv/installed-test: pyproject.toml | $(BIN)/python
	@$(call install,.[test])
	@touch .venv/installed $@

.venv/installed-dev: pyproject.toml | $(BIN)/python
	@$(call install,.[test$(comma)dev])
	@touch .venv/installed .venv/installed-test $@

comma := ,

demo: .venv/installed ## the whole pipeline on the embedded sample, a few minutes on two cores
	@$(BIN)/python tools/demo.py

test: .venv/installed-test ## every test but the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

test-slow: .venv/installed-test ## the long proofs
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

test-seeds: .venv/installed-test ## the proofs of learning with ten seeds and room, slow ones included
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m learning --learning-seeds 10

lint: .venv/installed-dev ## ruff's checks, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev ## ruff's fixes and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed-dev ## mypy
	$(BIN)/mypy

compare: .venv/installed ## losses of every *_tiny recipe, here and at BASE=<commit>: equal to the last digit?
	@test -n "$(BASE)" || { echo "Say which commit: make compare BASE=<commit>"; exit 1; }
	$(BIN)/python tools/compare_losses.py base=$(BASE)

table: .venv/installed ## rewrite the tables of recipes
	$(BIN)/python tools/recipe_table.py

clean: ## remove .venv, caches and build files; outputs/, labels/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find pretrain recipes tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
