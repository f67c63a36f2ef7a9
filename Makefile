# make demo: train a small CoAtNet on real pictures    make test: all tests    make check: the quick ones
# make setup: the environment alone                    make lint: format, types, import arrows

VENV := .venv
BIN := $(VENV)/bin
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
SYSTEM_PACKAGES := python3-venv
# Two files at a time, each as a whole on one worker: fixtures of a file are computed once.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test check lint format setup clean

demo: setup
	@$(BIN)/coatnet demo

test: setup
	@$(PYTEST)

check: setup
	@$(PYTEST) -q -m "not slow"

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; $(BASE_PYTHON) is older" >&2; exit 1; }
	@if ! $(BASE_PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing system packages: $(SYSTEM_PACKAGES)"; \
	    apt-get -o DPkg::Lock::Timeout=300 update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; \
	  else \
	    echo "error: this Python cannot make virtual environments; as root: apt-get install $(SYSTEM_PACKAGES)" >&2; exit 1; \
	  fi; fi
	@echo "Installing Python packages into $(VENV), which takes a minute or two"
	@$(BASE_PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) --upgrade pip
	@$(INSTALL) torch
	@$(INSTALL) -e '.[development]'
	@touch $@

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
