# Every target makes the virtual environment and installs what it needs first; the second time is quick.
#
#   make demo    events of 3,000 visitors, run through the whole way into SQLite
#   make test    the tests
#   make test-spark    those of Spark, which is 450 MB to download
#   make lint    style, format, types
#   make docs    the documentation as a site, in site/
#   make bench   the benchmarks, full size
#
# PYTHON=python3.12 make test    with another interpreter (remove .venv first)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST_ARGS ?= -n 3 # many of them wait for servers

.DEFAULT_GOAL := test
.PHONY: demo test test-spark lint docs bench clean

demo: $(VENV)/base.stamp
	$(BIN)/recognition demo

test: $(VENV)/dev.stamp $(VENV)/fakesnow.stamp $(VENV)/viewers.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-spark: $(VENV)/dev.stamp $(VENV)/spark.stamp
	$(BIN)/python -m pytest tests/test_spark.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

# Any warning fails it. What is made of the code is made before: python docs/generate.py
docs: $(VENV)/docs.stamp
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m mkdocs build --quiet --strict

bench: $(VENV)/dev.stamp
	@set -e; for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

clean:
	rm -rf $(VENV) build dist site recognition-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache

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
	$(PIP) install --constraint constraints.txt --editable '.[all,chdb]' --group dev
	@touch $@

$(VENV)/docs.stamp: $(VENV)/base.stamp
	$(PIP) install 'pip>=25.1'
	$(PIP) install --constraint constraints.txt --group docs
	@touch $@

# A server for the tests of Snowflake's sink, apart because it needs an older connector.
$(VENV)/fakesnow.stamp: tests/fakesnow_requirements.txt | $(VENV)/base.stamp
	$(PYTHON) -m venv --clear $(VENV)/fakesnow
	$(VENV)/fakesnow/bin/python -m pip -qq --disable-pip-version-check install --requirement $<
	@touch $@

# Those who read Mermaid and DOT, for the tests of what they are given, and Cytoscape.js as it was
# published. They run in Chromium; without npm these tests are skipped.
$(VENV)/viewers.stamp: tests/viewers.txt | $(VENV)/base.stamp
	@if ! command -v npm > /dev/null; then \
	  echo "npm is missing: what is drawn is not read by Mermaid and Graphviz" >&2; \
	else set -e; rm -rf $(VENV)/viewers; mkdir $(VENV)/viewers; \
	  npm pack --silent --pack-destination $(VENV)/viewers $$(cat $<) > /dev/null; \
	  cd $(VENV)/viewers; \
	  tar -xzOf cytoscape-*.tgz package/dist/cytoscape.min.js > cytoscape.js; \
	  tar -xzOf mermaid-*.tgz package/dist/mermaid.min.js > mermaid.js; \
	  tar -xzOf viz-js-viz-*.tgz package/dist/viz-global.js > viz.js; \
	  rm ./*.tgz; touch ../viewers.stamp; \
	fi

# Spark, for the tests of files: unpacked as it is published. To install it pip makes a wheel of its
# 450 MB first, which takes longer than the tests do.
$(VENV)/spark.stamp: tests/spark_requirements.txt | $(VENV)/base.stamp
	rm -rf $(VENV)/spark
	mkdir $(VENV)/spark
	$(PIP) download --no-deps --no-binary pyspark --dest $(VENV)/spark --requirement $<
	tar -xzf $(VENV)/spark/pyspark-*.tar.gz --strip-components=1 -C $(VENV)/spark
	rm $(VENV)/spark/pyspark-*.tar.gz
	@touch $@
