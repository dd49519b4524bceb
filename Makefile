# `make quickstart` and `make test` do everything from a fresh clone: Python 3.11 or later (Debian: python3.11-venv).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install quickstart test test-fast lint format bench

help:
	@echo 'make install     .venv with the pinned packages and rayft itself, editable; quick when up to date'
	@echo 'make quickstart  train MiniLM on SMS messages with two workers, print the scores and the model folder'
	@echo 'make test        every test'
	@echo 'make test-fast   the tests that take a few seconds each'
	@echo 'make lint        formatting, lint and types'
	@echo 'make bench       every benchmark that this machine can run; writes the README'"'"'s table'
	@echo 'make format      mend formatting and what lint can mend'

install: $(STAMP)

# The stamp is written last, so an installation that was interrupted starts again. An environment that was half made then
# has Python and no pip, which is added: nothing in it is deleted, since it may be a link to one that others use.
$(STAMP): cluster/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rayft needs Python 3.11 or later")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo 'Python cannot make virtual environments here; on Debian: apt-get install python3.11-venv' >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r cluster/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install
	$(BIN)/rayft run jobs/quickstart.yaml

# A slow test waits for a quarter of its time: two at once fill it. Those that kill and count seconds run alone.
test: test-fast
	$(BIN)/pytest -m '(slow or gpu) and not (cluster or alone)' --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m 'cluster or alone'

test-fast: install
	$(BIN)/pytest -m 'not slow and not cluster and not gpu' --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python tests/benchmarks/bench.py
