# `make demo` and `make test` set everything up on a fresh machine that has Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench smoke renew-image clean
.DEFAULT_GOAL := demo

demo: .venv/runtime
	$(BIN)/abliterate demo

test: .venv/dev
	$(BIN)/pytest -n auto --dist loadgroup --cov --cov-report term:skip-covered

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/shellcheck entrypoint.sh .ci/run infra/vast/onstart.sh infra/image/renew.sh
	$(BIN)/shfmt -d -i 4 entrypoint.sh .ci/run infra/vast/onstart.sh infra/image/renew.sh
	$(BIN)/hadolint Dockerfile

# The base image's digest and the hashes of what the image installs, in the versions of constraints.txt.
renew-image:
	infra/image/renew.sh

# What needs nothing but this machine; `python -m benchmarks.peer` installs heretic from PyPI and is left to be asked for.
bench: .venv/runtime
	$(BIN)/python -m benchmarks.trials
	$(BIN)/python -m benchmarks.shapes --json runs/shapes.json

# Everything on a small real model, where there is internet: docs/first-real-model.md.
MODEL ?= Qwen/Qwen2.5-0.5B-Instruct
SMOKE ?= --trials 24
smoke: .venv/runtime
	$(BIN)/abliterate preflight $(MODEL) $(SMOKE) --workspace runs/smoke
	$(BIN)/abliterate run $(MODEL) $(SMOKE) --workspace runs/smoke
	$(BIN)/abliterate front --workspace runs/smoke
	$(BIN)/abliterate evaluate --workspace runs/smoke
	$(BIN)/abliterate chat --workspace runs/smoke --prompt "What is the capital of France?"

.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv dist build
