# Targets that use the virtual environment bring it up first; `make setup` alone does just that.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help setup demo test test-slow test-all next-torch check format docs picture fuzz assets deep-compression bench clean distclean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s%s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv and install the tested set of packages

# One command for torch and torchvision, and before anything that depends on them: see constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than Python 3.11; name another: make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "make: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2; \
	  exit 1; }
	$(PIP) torch torchvision
	$(PIP) -e '.[dev,track,plots,detect,timm,hf,audio]'
	@$(PY) -m modelopt_cli.torchvision_start
	@touch $@

demo: $(STAMP) ## train, prune, quantize and evaluate a small network on the bundled digits, into demo/
	@$(PY) -m modelopt_cli.demo $(ARGS)

# Two tests at a time, on one thread each.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test: $(STAMP) ## run the quick tests (ARGS="-k name" chooses some)
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP) ## run the tests that `make test` leaves out
	@$(PYTEST) -m slow $(ARGS)

test-all: $(STAMP) ## run all tests
	@$(PYTEST) $(ARGS)

# The versions after the range in pyproject.toml: what breaks with them is to be known before the range is moved.
NEXT := torch==2.14.* torchvision==0.29.*

next-torch: ## run the quick tests with the next minor version of torch, in .venv-next (gigabytes where it is built for CUDA)
	@$(PYTHON) -m venv --clear .venv-next
	.venv-next/bin/pip install --quiet --no-cache-dir $(foreach each,$(NEXT),"$(each)")
	grep -v '^torch' constraints.txt >.venv-next/constraints.txt
	.venv-next/bin/pip install --quiet -c .venv-next/constraints.txt numpy pydantic PyYAML rich safetensors typer pytest pytest-xdist hypothesis scipy \
	  matplotlib pyarrow ptflops tensorboard pycocotools
	.venv-next/bin/pip install --quiet --no-deps -e .
	@OMP_NUM_THREADS=1 .venv-next/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

check: $(STAMP) ## formatting, lint, types, and that the generated docs are fresh
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) tools/docs.py --check

format: $(STAMP) ## format the code and fix what lint can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(STAMP) ## regenerate docs/cli.md and the tables of choices from the declarations
	$(PY) tools/docs.py

picture: demo ## regenerate the picture of the table in the README
	$(PY) tools/picture.py demo/digits.safetensors demo/digits-pruned.safetensors demo/digits-pruned-int8.safetensors

fuzz: $(STAMP) ## give hostile files from random seeds to the readers (ARGS="--minutes 60", or "--seed N")
	@OMP_NUM_THREADS=1 $(PY) tools/fuzz.py $(ARGS)

assets: $(STAMP) ## fetch the real networks and images that some tests use, into assets/
	@$(PY) tools/assets.py $(ARGS)

deep-compression: $(STAMP) ## prune, share and code a network for Fashion-MNIST (after make assets), into build/
	@mkdir -p build
	@$(PY) -m modelopt_cli run configs/deep-compression.yaml --resume $(ARGS)

bench: $(STAMP) ## run the side-by-side measurements in benchmarks/
	@$(PY) -m benchmarks $(ARGS)

clean: ## remove what the targets above made, but not .venv and assets/
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv and assets/ too
	rm -rf $(VENV) .venv-next assets
