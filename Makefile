# moesaic: `make serve` serves the demo model, `make test` checks everything. Both work on a fresh machine with Python >= 3.11.
#   make serve ARGS="--port 8000"     further flags for `moesaic serve` (a later flag wins)
#   make serve PYTHON=python3.12      another Python for the virtual environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
NIXL := nixl nixl-cu12
CUTE_DSL := nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu12 cuda-bindings cuda-pathfinder
CODE := attention eplb kernels launch moe overlap tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help serve test lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.serve-stamp ## serve the demo model on two CPU ranks at 127.0.0.1:30000
	@exec $(BIN)/moesaic serve --model-path demo --tp 2 --dp 2 --enable-dp-attention --enable-dp-lm-head --moe-a2a-backend torch \
		--host 127.0.0.1 --port 30000 $(ARGS)

test: lint ## lint, types, and all tests but the whole product
	$(BIN)/python -m pytest -q -m "not whole" -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.test-stamp .typing/moesaic ## ruff and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.test-stamp ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## remove what was built, the virtual environment included
	rm -rf $(VENV) .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "moesaic needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Install one and name it: make serve PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# nixl (a transport of prefill/decode disaggregation) and CuTe DSL (the compiler of kernels/cute) go in without their dependencies,
# which would bring CUDA's packages; what CuTe DSL needs of them to compile is named.
# The stamps say which dependencies are in: a second run starts at once, a changed pyproject or constraints file installs again.
$(VENV)/.serve-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moesaic (the first time takes a minute or two)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moesaic and what its tests need"
	@$(PIP) -e '.[test]'
	@case "$$(uname -sm)" in \
		"Linux x86_64"|"Linux aarch64") $(PIP) --no-deps $(NIXL) $(CUTE_DSL) ;; \
		*) echo "no wheels of nixl and CuTe DSL for $$(uname -sm): the tests of that transport and of kernels/cute are skipped" ;; esac
	@touch $@ $(VENV)/.serve-stamp

# mypy does not see an editable install of folders that lie side by side under one namespace.
.typing/moesaic:
	@mkdir -p .typing && ln -sfn .. $@
