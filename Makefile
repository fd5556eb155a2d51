# Every target makes what it needs: the environment in .venv, and the installation in it. Repeated calls cost nothing.
#
#   make quickstart   the whole story on a CPU: sample, label, train, sample again, score, report
#   make test         the default suite            make test-slow   the rest of it
#   make lint         ruff and mypy                make format      let ruff rewrite the files
#   make bench        the benchmarks               make clean       remove the environment and what tools left
#
# PYTHON=...  the interpreter to make .venv with (3.11 or newer; found if not given)
# ARGS=...    goes to pytest or to the quickstart, for example: make test ARGS="tests/test_config.py -x"
# WORKERS=... test processes (2)

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow lint format bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/mmalign quickstart $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	set -e; for file in bench/*.py; do $(BIN)/python $$file $(ARGS); done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find mmalign evaluators tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is newer than pyproject.toml when what that file asks for is installed.
$(VENV)/.installed: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

# The first interpreter that really runs, is new enough and can make an environment with pip in it.
$(VENV)/.made:
	@check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
	    if "$$python" -c "$$check" >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "mmalign needs Python 3.11 or newer with its venv module, and none of these is one:" \
	         "$(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)." >&2; \
	    echo "Install one (on Debian or Ubuntu: apt install python3.11 python3.11-venv), or name one:" \
	         "make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "making $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv $(VENV)
	@touch $@
