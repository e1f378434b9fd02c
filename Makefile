# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
#
#   PYTHON    the interpreter that makes the environments (3.11 or newer)
#   VENV      where the environment goes
#   WORKERS   how many processes test, or run the pages' code; `auto` is one for each core
#   ARGS      extra arguments for pytest, for the demo, for the benchmark or for nox
#   TORCH     with `make matrix`, the version of PyTorch in every corner

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
ARGS ?=

BIN := $(VENV)/bin
PINS := $(abspath constraints.txt)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint $(PINS)

# One thread for each process: tests share the cores out, and where cores are busy the threads of
# small matrices wait for each other for most of the time.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NPROC=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

MKDOCS := NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all mutants lint format docs browse serve bench bare \
    package matrix audit clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/installed ## learn the digits in both wings; table and pictures
	$(ONE_THREAD) $(BIN)/python benchmarks/demo.py $(ARGS)

test: $(VENV)/installed ## the laws and the hosts' tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(VENV)/installed ## every test
	$(PYTEST) -m "" $(ARGS)

mutants: $(VENV)/installed-mutants ## small faults, one at a time: do the tests notice? takes hours
	$(ONE_THREAD) $(BIN)/python tests/mutants.py --wing pyro $(ARGS)
	$(ONE_THREAD) $(BIN)/python tests/mutants.py --wing numpyro $(ARGS)

lint: $(VENV)/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-bench ## build the site into site/; a warning is an error
	@count=$(WORKERS); test $$count != auto || count=$$(nproc); test $$count = 1 || \
	    for i in $$(seq $$count); do DOCS_SHARE=$$i/$$count $(MKDOCS) build --no-strict --quiet \
	    --site-dir $(abspath .cache)/docs/share-$$i > /dev/null 2>&1 & done; wait
	$(MKDOCS) build --strict

browse: $(VENV)/installed-browser ## test the built site in Chromium; writes screenshots into out/site/
	$(PYTEST) tests/site -p no:cacheprovider -m "" $(ARGS)

serve: $(VENV)/installed-bench ## serve the site while writing it
	$(MKDOCS) serve

bench: $(VENV)/installed-bench ## speed beside the other libraries; writes docs/benchmarks.md
	$(BIN)/python benchmarks/speed.py $(ARGS)

install: $(VENV)/installed ## make the environment and nothing else

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"pyroflows needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) --editable ".[all,dev,docs]"
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --editable ".[bench]"
	@touch $@

$(VENV)/installed-browser: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --editable ".[browser]"
	@touch $@

$(VENV)/installed-mutants: $(VENV)/installed
	@$(BIN)/python $(PIP_INSTALL) --editable ".[mutants]"
	@touch $@

# Each wing alone in an environment of its own, from a wheel, as a user would have it.
bare: ## prove that either wing installs without the other
	rm -rf $(VENV)-bare
	$(PYTHON) -m venv $(VENV)-bare/numpyro
	$(VENV)-bare/numpyro/bin/python $(PIP_INSTALL) ".[numpyro]"
	$(VENV)-bare/numpyro/bin/python -I .ci/bare.py numpyro_flows pyroflows
	$(PYTHON) -m venv $(VENV)-bare/pyro
	$(VENV)-bare/pyro/bin/python $(PIP_INSTALL) torch
	$(VENV)-bare/pyro/bin/python $(PIP_INSTALL) ".[pyro]"
	$(VENV)-bare/pyro/bin/python -I .ci/bare.py pyroflows numpyro_flows
	rm -rf $(VENV)-bare

$(VENV)-release/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-release
	@$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check \
	    "build>=1.2" "cffconvert>=2" "nox>=2024.10" "pip-audit>=2.7" "twine>=6.1" "uv>=0.5"
	@touch $@

package: $(VENV)-release/installed ## build wheel and sdist into dist/, and check their metadata
	rm -rf dist
	$(VENV)-release/bin/python -m build
	$(VENV)-release/bin/twine check --strict dist/*
	$(VENV)-release/bin/cffconvert --validate

matrix: package ## the wheel on each Python, with the lowest and the newest versions; an hour
	$(VENV)-release/bin/nox $(ARGS)

audit: $(VENV)-release/installed ## known vulnerabilities of the pinned versions; needs a network
	$(VENV)-release/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

clean: ## remove the environments and everything that was built
	rm -rf $(VENV) $(VENV)-bare $(VENV)-release .nox build dist site out .cache
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pyroflows_common pyroflows numpyro_flows tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
