# `make help` lists what there is. Everything happens in .venv; nothing else is touched.

PYTHON ?= python3
# A plain torch from PyPI brings CUDA on x86-64 Linux (gigabytes). For the CPU build only:
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
# Tests at a time, of those that measure no time; 0: one after the other, in this process.
JOBS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.ready

TOOLS := .tools
PYTEST := $(BIN)/python -m pytest
USUAL := not full and not nightly
# Containers like to set it, and then each of the thousand processes that tests start compiles us.
unexport PYTHONDONTWRITEBYTECODE
# ARGS may name tests of one half only.
OR_NONE := || [ $$? = 5 ]

.PHONY: help env tools run sweep test test-full nightly fuzz soak examples bench-joins bench-tls bench bench-inference docs recording lint format dist clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

env: $(STAMP) ## make .venv with all that run, test and bench need

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give one with PYTHON=…, this is " + sys.version)'
	@echo "Making .venv (once; torch alone takes a minute or more)"
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) install -q -e ".[dev]"
	@touch $@

# Each in an environment of its own: they pin what we and each other use in other versions.
tools: $(TOOLS)/.ready ## make .tools: SAM, AWS's command line, a local AWS, and linters, which test-full uses

$(TOOLS)/.ready: Makefile
	@echo "Making $(TOOLS) (once; some two minutes)"
	$(call tool,sam,aws-sam-cli==1.170.0)
	$(call tool,ministack,ministack==1.5.33 aws-sam-translator docker)
	$(call tool,checkov,checkov==3.3.30)
	$(call tool,aws,awscli==1.45.11)
	-npm install --silent --no-audit --no-fund --prefix $(TOOLS)/node asl-validator@4.0.0
	@touch $@

tool = $(PYTHON) -m venv $(TOOLS)/$(1) && $(TOOLS)/$(1)/bin/python -m pip install -q --disable-pip-version-check $(2)

run: env ## a job of 4 ranks on demo data, from init to plot; ARGS="--world-size 2"
	@$(BIN)/cosmic run $(ARGS)

sweep: env ## 20 configurations of demo data and their report, some two minutes; ARGS="--repeat 3"
	@$(BIN)/cosmic sweep $(ARGS)

test: env ## the test suite, with coverage; ARGS="-k punch"
	$(PYTEST) -n $(JOBS) --dist loadfile --timeout 120 -m "$(USUAL) and not alone" --cov --cov-report= $(ARGS) $(OR_NONE)
	$(PYTEST) -m "$(USUAL) and alone" --cov --cov-append --cov-report=term:skip-covered $(ARGS) $(OR_NONE)

test-full: env ## the tests that need root, Docker, an emulator or a browser; ARGS as for test
	$(PYTEST) -m "full and not nightly" $(ARGS)

nightly: env ## the long tests of docs/reliability.md, about an hour; ARGS="-k soak"
	$(PYTEST) -m nightly --timeout 3000 $(ARGS)

fuzz: env ## random bytes for every parser, ten minutes in all; ARGS="--minutes 30 server"
	-$(PIP) install -q atheris
	$(BIN)/python -m tests.reliability.fuzz $(ARGS)

soak: env ## jobs whose ranks are killed, for half an hour; ARGS="--minutes 5"
	$(BIN)/python -m benchmarks.soak $(ARGS)

examples: env ## run each program of examples/, by itself; ARGS="--ranks 2"
	@set -e; for name in monte_carlo_pi mean_and_variance histogram sgd word_count; do \
		echo "examples/$$name.py"; $(BIN)/python -m examples.$$name $(ARGS); done

bench-joins: env ## measure how many joins a second, and 10,000 ranks of one job
	$(BIN)/python -m benchmarks.joins $(ARGS)

bench-tls: env ## measure what TLS costs, some two minutes
	$(BIN)/python -m benchmarks.tls $(ARGS)

bench: env ## measure our collectives beside gloo and Open MPI, some ten minutes; ARGS="--rounds 2"
	$(PIP) install -q -e ".[bench]"
	$(BIN)/python -m benchmarks.collectives $(ARGS)

bench-inference: env ## measure our engines beside the reference's loop, some twelve minutes; ARGS="--rounds 2"
	$(BIN)/python -m benchmarks.inference $(ARGS)

docs: env ## the documentation as a site, in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "Open build/site/index.html"

recording: env ## docs/img/run.svg, what a terminal shows after `cosmic run`; on a quiet machine
	@$(BIN)/python docs/recording.py

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: env ## wheel and sdist, into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove .venv, .tools, builds, caches, and what runs left in results/ and data/
	rm -rf .venv $(TOOLS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
	rm -rf .coverage .coverage.* coverage.xml results data
	find . -name __pycache__ -type d -prune -exec rm -r {} +
