# make help prints the targets. Each makes .venv first, once; it is installed again only when the files it depends on change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo test test-all lint clean help venv

VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# The interpreter that .venv is made with: PYTHON=/path/to/python, or the first of these that runs and is new enough.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3 python
ARGS  ?=
FRESH ?=

help:  ## what there is
	@echo "make demo            the whole chain on the demo corpus, ending in runs/demo/report.html (FRESH=1 starts over)"
	@echo "make test            the quick tests (ARGS='-k name' picks some)"
	@echo "make test-all        the slow tests too"
	@echo "make lint            ruff and pyright"
	@echo "make clean           remove caches and .venv; runs/ stays"

demo: $(STAMP)
	@$(BIN)/python demo/run.py $(if $(filter-out 0,$(FRESH)),--fresh) $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(STAMP)
	@$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf "$(VENV)" .pytest_cache .ruff_cache build dist *.egg-info
	find data_pipeline maws eval demo tests -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP)  ## the environment alone

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@python=""; \
	for name in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: Python 3.11 or newer is needed and none of these is: $(if $(PYTHON),$(PYTHON),$(PYTHONS)); install it or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	  echo "error: $$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	if ! "$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  echo "==> making $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
	  "$$python" -m venv --clear "$(VENV)"; \
	fi
	@echo "==> installing into $(VENV) (the first time about 4 minutes; 6 GB, most of it torch and its CUDA libraries)"
	@"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$(STAMP)"
	@echo "==> $(VENV) is ready"
