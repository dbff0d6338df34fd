# Needs Python 3.11 or newer, make and git; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
STEPS ?= 200
WORKERS := --numprocesses auto --dist loadgroup

LOWEST := .venv-lowest
AUDIT := .venv-audit
LOWEST_PINS := requirements/lowest.txt

.PHONY: demo test docs typing test-wheel test-integrations test-lowest test-distributed test-deepspeed mutants soak fuzz audit confusion bench bench-hold bench-monitor \
	bench-ddp bench-shadow bench-zero-hold bench-fake gpu figures lint types clean

demo: $(VENV)/.demo
	$(BIN)/python -m modaldummy demo --steps $(STEPS)

test: lint types
	$(BIN)/python -m pytest $(WORKERS) --cov

# All tests of the integrations, examples and benchmarks, with every library that they use; minutes on 2 cores.
test-integrations: $(VENV)/.dev $(VENV)/.integrations
	$(BIN)/python -m pytest tests/integrations tests/test_examples.py tests/test_benchmarks.py -m "long or not long" $(WORKERS)

# The suite on the oldest torch and numpy that pyproject.toml admits; downloads several GB once.
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest

# Every engine on several ranks; about half an hour on 2 cores. `make test-deepspeed` runs those of DeepSpeed alone.
test-distributed: $(VENV)/.dev
	$(BIN)/python -m pytest tests/distributed -m "long or not long"

test-deepspeed: $(VENV)/.dev
	$(BIN)/python -m pytest tests/distributed -k "deepspeed or ZeRO" -m "long or not long"

# The site, into site-output/index.html; any warning is an error. Needs no network once installed.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs site-output

# What would be released, built and tried as users get it, the whole suite included.
test-wheel: $(VENV)/.dev $(VENV)/.release
	$(BIN)/python -m tools.check_wheel

# Types as users see them, from outside, by two checkers; brings Node, some 200 MB.
typing: $(VENV)/.dev $(VENV)/.typing
	cd typing_tests && ../$(BIN)/mypy
	$(BIN)/pyright --project typing_tests --pythonpath $(BIN)/python
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/pyright --verifytypes modaldummy --ignoreexternal

# Breaks the core in thousands of ways and runs its tests on each; an hour or two on 2 cores. Lists what no test notices.
# `make mutants MUTANTS='modaldummy._core.paths.*'` takes one file. A second run tries only what changed.
mutants: $(VENV)/.dev $(VENV)/.mutation
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results

# 100,000 broken logs and batches; about six minutes on one core.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tools.fuzz

# Known vulnerabilities of the pinned packages, from the index's advisories; what it cannot look up is a failure.
audit: $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(CONSTRAINTS)

# Code lines by package, tests per source line, words of the documentation.
figures: $(VENV)/.dev
	$(BIN)/python -m tools.figures

soak: $(VENV)/.dev
	$(BIN)/python -m tools.soak

# The tables of docs/reference/confusion.md; about two minutes on 2 cores.
confusion: $(VENV)/.dev
	$(BIN)/python -m tools.confusion

# The figures of docs/explanation/cost.md for this machine; about a quarter of an hour on 2 cores.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_sum.py --seconds 4 --csv --plot
	$(BIN)/python benchmarks/bench_step.py --rounds 100 --csv
	$(BIN)/python benchmarks/bench_maps.py --csv
	$(BIN)/python benchmarks/targets.py --seconds 2
	$(BIN)/python benchmarks/show_alternatives.py --csv

# The figures of docs/explanation/what-a-dummy-gradient-does.md; about an hour on 2 cores.
bench-hold: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_drift.py --csv --plot
	$(BIN)/python benchmarks/bench_learning.py --csv --plot

# The table of docs/how-to/monitor.md; a minute on 2 cores.
bench-monitor: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_monitor.py --rounds 200 --csv

# The tables of docs/explanation/ranks.md; about a quarter of an hour on 2 cores.
bench-ddp: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_ddp.py --csv

# The table of docs/explanation/cost.md for shadows; about a quarter of an hour on 2 busy cores.
bench-shadow: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_shadow.py --csv

# The table of docs/how-to/hold.md for DeepSpeed; some minutes on 2 cores.
bench-zero-hold: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_zero_hold.py --csv

# The table of docs/explanation/alternatives.md for fake inputs; some minutes on one core.
bench-fake: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_fake.py --csv

# On a machine with a CUDA device, with the Python that has PyTorch; installs nothing.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu:
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LOWEST) $(AUDIT) *-output demo-output* mutants dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run start at once, and a changed pyproject install again.
# DeepSpeed builds nothing: its operators for GPUs are not tested.
$(VENV)/.%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@

# By itself: what it needs is not what it audits.
$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	touch $@

# The everyday pins, but for the floors.
$(LOWEST)/.dev: pyproject.toml $(CONSTRAINTS) $(LOWEST_PINS)
	$(PYTHON) -m venv $(LOWEST)
	grep -vE "^($$(sed -n 's/==.*//p' $(LOWEST_PINS) | paste -sd '|'))==" $(CONSTRAINTS) > $(LOWEST)/pins.txt
	cat $(LOWEST_PINS) >> $(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/pins.txt --editable '.[dev]'
	touch $@
