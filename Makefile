# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo evidence docs test test-core harden lint types format clean
help:
	@echo "make demo      mine, train and evaluate on the embedded data (a few minutes); results in runs/demo"
	@echo "make evidence  the runs behind docs/evidence.md (hours; finished runs are kept), and that page"
	@echo "make docs      the site from docs/, strictly; result in site/"
	@echo "make test      run all tests                     (ARGS='-k name' to choose)"
	@echo "make test-core run the fifth that protects most (under two minutes)"
	@echo "make harden    damaged inputs, signals, kills, bad disks and random steps, for MINUTES=10"
	@echo "make lint      ruff check and format check"
	@echo "make types     mypy"
	@echo "make format    let ruff rewrite the code"
	@echo "make venv      only create .venv and install"
	@echo "make clean     remove .venv and caches, not runs/"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "b3 needs Python 3.10 or newer; say: make PYTHON=python3.11 ..."; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "python venv is missing; on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python scripts/demo.py $(ARGS)

evidence: $(STAMP)
	@$(BIN)/python -m benchmarks.evidence $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-core: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m core $(ARGS)

MINUTES ?= 10
part = $$(awk 'BEGIN { print $(MINUTES) * $(1) / 10 }')  # tenths of the time
harden: $(STAMP)
	$(BIN)/python tests/hardening/mutate_inputs.py --cases 1000000 --minutes $(call part,2) --seed $$$$
	$(BIN)/python tests/hardening/stress.py --starts 1000000 --minutes $(call part,3) --seed $$$$
	$(BIN)/python tests/hardening/crash.py --kills 1000000 --minutes $(call part,2) --seed $$$$
	$(BIN)/python tests/hardening/disk.py --cases 1000000 --minutes $(call part,2) --seed $$$$
	$(BIN)/python tests/hardening/random_steps.py --minutes $(call part,1) --first $$$$000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
