# Every target makes the virtual environment and installs what it needs first; the second time is quick.
#
#   make demo    events of 3,000 visitors, run through the whole way into SQLite
#   make test    the tests
#   make lint    style, format, types
#   make bench   the benchmarks, full size
#
# PYTHON=python3.12 make test    with another interpreter (remove .venv first)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := test
.PHONY: demo test lint bench clean

demo: $(VENV)/base.stamp
	$(BIN)/recognition demo

test: $(VENV)/dev.stamp $(VENV)/fakesnow.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

bench: $(VENV)/dev.stamp
	@set -e; for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

clean:
	rm -rf $(VENV) build dist recognition-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/base.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "recognition needs Python 3.11 or newer, but \"$(PYTHON)\" is $$($(PYTHON) --version 2>&1)." \
	       "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

# pip knows dependency groups (PEP 735) since 25.1.
$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) install 'pip>=25.1'
	$(PIP) install --constraint constraints.txt --editable '.[cli,clickhouse,duckdb,mongo,mysql,postgresql,redshift,snowflake]' --group dev
	@touch $@

# A server for the tests of Snowflake's sink, apart because it needs an older connector.
$(VENV)/fakesnow.stamp: tests/fakesnow_requirements.txt | $(VENV)/base.stamp
	$(PYTHON) -m venv --clear $(VENV)/fakesnow
	$(VENV)/fakesnow/bin/python -m pip -qq --disable-pip-version-check install --requirement $<
	@touch $@
