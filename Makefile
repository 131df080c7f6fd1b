# Two commands on a fresh machine (Debian, Python 3.11+, gcc, make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# compiling bytecode for all of torch and transformers at install time costs more than it ever gives back here
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt

.PHONY: demo test lint clean

$(BIN)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(BIN)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/quickstart.sh demo-run

test: lint
	$(BIN)/python -m pytest

lint: $(BIN)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy hybridize commands

clean:
	rm -rf $(VENV) demo-run
