# make demo: train a small CoAtNet on real images      make test: all tests    make check: the quick ones
# make setup: create the environment                   make lint: format, types, imports, shell scripts

VENV := .venv
BIN := $(VENV)/bin
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
SYSTEM_PACKAGES := python3-venv
# The browser in which tests look at the report of a run.
BROWSER_PACKAGES := chromium
# A real cluster for the tests, with accounting, and the programs that show that it is installed.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server
SLURM_PROGRAMS := slurmctld slurmd sbatch munged slurmdbd mariadbd
APT := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300
APT_INSTALL := $(APT) update -qq && $(APT) install -y -qq --no-install-recommends
# On two cores, two files compute at a time while a third one waits for Slurm, see tests/support/distribution.py.
# All tests of a file are on one worker, so that its fixtures are computed once.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
# pip compiles what it installs on one core.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test check lint format setup slurm browser clean

demo: setup
	@$(BIN)/coatnet demo

test: setup slurm browser
	@$(PYTEST)

check: setup
	@$(PYTEST) -q -m "not slow"

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck slurm/*.sbatch slurm/launch.sh benchmarks/*.sh benchmarks/rehearsal/run.sh

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
	    $(APT_INSTALL) $(SYSTEM_PACKAGES) >/dev/null; \
	  else \
	    echo "error: this Python cannot make virtual environments; as root: apt-get install $(SYSTEM_PACKAGES)" >&2; exit 1; \
	  fi; fi
	@echo "Installing Python packages into $(VENV), which takes a minute or two"
	@$(BASE_PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) --upgrade pip
	@$(INSTALL) torch # first: whatever depends on it then takes this one, and torchvision the version that belongs to it
	@$(INSTALL) -e '.[development]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # torch has a file for newer versions of Python
	@touch $@

slurm:
	@for program in $(SLURM_PROGRAMS); do \
	  PATH=$$PATH:/usr/sbin command -v $$program >/dev/null && continue; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing system packages: $(SLURM_PACKAGES)"; \
	    $(APT_INSTALL) $(SLURM_PACKAGES) >/dev/null && break; \
	  fi; \
	  echo "Leaving out the tests on Slurm: $$program is missing; as root: apt-get install $(SLURM_PACKAGES)"; break; \
	done

browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing system packages: $(BROWSER_PACKAGES)"; \
	    $(APT_INSTALL) $(BROWSER_PACKAGES) >/dev/null && exit 0; \
	  fi; \
	  echo "Leaving out the tests in a browser: chromium is missing; as root: apt-get install $(BROWSER_PACKAGES)"; }

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
