# Each target sets itself up: it needs Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test code-checks quick-tests test-all attack pages table docs tutorials clean

demo: $(VENV)/.ready
	$(BIN)/mimicut demo

test: $(VENV)/.ready
	$(MAKE) -j 2 code-checks quick-tests

code-checks: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick-tests: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not long and not attack and not pages"

# The same, and then what takes long: whole architectures, benchmarks, every method.
test-all: test
	$(BIN)/python -m pytest -m long

# Kills, signals, disks that refuse, injected exceptions, hostile files and images, ten jobs of which two lose their
# worker; what was survived is counted in benchmarks/results/attacks.json. ATTACKS=0.1 takes a tenth of them and counts
# nothing.
attack: $(VENV)/.ready
	$(if $(ATTACKS),,rm -f benchmarks/results/attacks.json)
	$(if $(ATTACKS),,ATTACK=whole) $(BIN)/python -m pytest tests/attacks
	$(BIN)/python -m pytest tests/cli/test_sweep.py -m attack -n 0

# Every command and block of Python on every page: a quarter of an hour or two.
pages: $(VENV)/.ready
	$(BIN)/python -m pytest tests/docs/test_blocks_run.py -m "long or pages"

# What is missing of the table (three to four hours on two cores for all of it), and docs/results.md from its lines.
table: $(VENV)/.ready
	for p in embedded_tuning embedded_200_tuning embedded_images_tuning embedded_long_tuning \
			embedded_transformer_tuning; do \
		$(BIN)/python -m benchmarks sweep $$p --ray || [ $$? -eq 3 ] || exit; done
	$(BIN)/python -m benchmarks tune
	for p in embedded embedded_mild embedded_long embedded_steps embedded_images embedded_transformer; do \
		$(BIN)/python -m benchmarks sweep $$p --ray || [ $$? -eq 3 ] || exit; done
	$(BIN)/python -m benchmarks page

# The site, into site/; a broken link, anchor or name ends it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The tutorials are run, and their pages written (a minute or two).
tutorials: $(VENV)/.docs
	$(BIN)/python docs/_tools/tutorials.py

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[docs]"
	touch $@

# The lock constrains the versions; what a platform does not need is not installed.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mimicut needs Python 3.11 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
