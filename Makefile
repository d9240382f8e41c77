# make run ARGS="..."   train and prune; the arguments are Hydra overrides
# make test             the whole test suite, the slow ones too
# make oldest           the fast tests on the oldest supported versions, on Python 3.10
# make docs             the site, in build/docs
# make check            test, lint, types and imports: what CI runs

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
VENV := .venv
BIN := $(VENV)/bin/python
ARGS ?=
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := check
.PHONY: run test oldest docs lint types imports check

run: $(VENV)/.installed-all
	"$(BIN)" -m lightning_prune $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 "$(BIN)" -m pytest $(PYTEST_ARGS)

# The fast tests on the oldest versions that pyproject.toml allows, in an environment of their own; but for the example of
# `equilibrate`, which prints a LayerNorm, of which torch 2.5 tells less.
oldest: $(VENV)-oldest/.installed
	OMP_NUM_THREADS=1 "$(VENV)-oldest/bin/python" -m pytest $(PYTEST_ARGS) -m "not slow" \
		--deselect lightning_prune/equilibrium/inserting.py::lightning_prune.equilibrium.inserting.equilibrate

docs: $(VENV)/.installed-dev
	"$(BIN)" -m sphinx -W --keep-going -b html docs build/docs

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

$(VENV)-oldest/.installed: pyproject.toml tests/oldest_versions.txt
	"$(OLDEST_PYTHON)" -m venv --clear "$(VENV)-oldest"
	"$(VENV)-oldest/bin/python" -m pip install --constraint tests/oldest_versions.txt \
		--editable ".[digits,vision,draw,report,cli]" pytest pytest-xdist hypothesis
	touch "$@"

# A stamp here too: an interrupted `venv` leaves a python without pip behind.
$(VENV)/.created:
	"$(PYTHON)" -m venv "$(VENV)"
	touch "$@"
