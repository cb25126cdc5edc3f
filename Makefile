# Quire's verbs. `make` alone lists them. Needs Python 3.11+ and make; everything is installed
# into .venv, in exact versions, the first time (and again only when those versions change).
#
#   TORCH=cpu     take PyTorch from its CPU index (small; no GPU)
#   PYTHON=...    the Python that .venv is made with
#   ARGS="..."    more words for the command: make serve ARGS="--port 9000"
SHELL := /bin/sh
.DEFAULT_GOAL := help
BIN := .venv/bin
RUN := $(BIN)/python -P
ARGS ?=
TORCH ?=
# xdist spreads whole files over workers, so that a file's servers are started once.
JOBS ?= 2
export PYTHON
.PHONY: help serve test lint format types protos bench dev audit coverage soak docs lock clean \
	setup-serve setup-dev

help: ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup-serve setup-dev: setup-%:
	@if [ -x $(BIN)/python ] && $(BIN)/python -c '' 2>/dev/null; then python=$(BIN)/python; \
	else python=$$(scripts/find-python) || exit 1; fi; \
	"$$python" scripts/setup.py $* $(if $(TORCH),--torch $(TORCH))

serve: setup-serve ## set up, then serve the demo model at http://127.0.0.1:8000
	@exec $(RUN) -m quire.cli serve $(ARGS)

test: setup-dev ## set up, then run the tests
	$(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

format: setup-dev ## let ruff rewrite what lint complains about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup-dev ## mypy: strict for quire, gateway, scheduler
	$(BIN)/mypy
	$(BIN)/mypy -p quire_worker -p quire_kernels

protos: setup-dev ## generate quire/v1 from protos/
	$(RUN) scripts/protos.py quire/v1

bench: setup-dev ## benchmark a running configuration; see benchmarks/
	$(BIN)/python benchmarks/serve.py $(ARGS)

dev: setup-dev ## serve, and start again when a source file changes
	@exec $(RUN) scripts/dev.py $(ARGS)

audit: setup-dev ## look for known vulnerabilities in the pinned versions
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip $(ARGS)

coverage: setup-dev ## tests with coverage, child processes included
	$(RUN) -m coverage erase
	$(RUN) -m pytest --cov --cov-report=term --cov-report=html $(ARGS)

soak: setup-dev ## the long tests
	$(RUN) -m pytest -m soak --timeout 0 $(ARGS)

docs: setup-dev ## generate docs/reference
	$(RUN) scripts/reference.py

lock: setup-dev ## write constraints.txt from what is installed
	$(RUN) scripts/pins.py

clean: ## remove caches and .venv
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov build dist
	rm -f .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
