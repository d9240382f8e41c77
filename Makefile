# make run ARGS="..."   train and prune; the arguments are Hydra overrides
# make test             the whole test suite, the slow ones too
# make check            test, lint, types and imports: what CI runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
ARGS ?=
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := check
.PHONY: run test lint types imports check

run: $(VENV)/.installed-all
	"$(BIN)" -m lightning_prune $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 "$(BIN)" -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	"$(BIN)" -m ruff check .
	"$(BIN)" -m ruff format --check .
	"$(BIN)" -m codespell_lib

types: $(VENV)/.installed-dev
	"$(BIN)" -m mypy

imports: $(VENV)/.installed-dev
	"$(BIN)" -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

check: test lint types imports

# A stamp is older than pyproject.toml exactly when the dependencies may have changed. [dev] holds [all].
$(VENV)/.installed-all: pyproject.toml | $(VENV)/.created
	"$(BIN)" -m pip install --editable ".[all]"
	touch "$@"

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	"$(BIN)" -m pip install --editable ".[dev]"
	touch "$(VENV)/.installed-all" "$@"

# A stamp here too: an interrupted `venv` leaves a python without pip behind.
$(VENV)/.created:
	"$(PYTHON)" -m venv "$(VENV)"
	touch "$@"
