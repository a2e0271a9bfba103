# make demo: set up and run the main job. make test: set up and pass the tests. Nothing else is needed first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-faults lint clean

demo: .venv/installed
	@if [ -f runs/demo/config.yaml ] && [ ! -f runs/demo/samples.png ]; then \
		echo "An unfinished demo is in runs/demo: resuming it."; \
		$(BIN)/ddpm-search resume runs/demo; \
	else \
		if [ -f runs/demo/samples.png ]; then \
			echo "A finished demo is in runs/demo: starting afresh."; \
			rm -rf runs/demo; \
		fi; \
		$(BIN)/ddpm-search run digits --name demo; \
	fi

PYTEST := $(BIN)/python -m pytest
# File by file, for what a file's tests share is made once. What starts a Ray wants both cores for itself.
BY_TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) $(BY_TWO) -m "not ray and not faults"
	$(PYTEST) -m "ray and not faults"

test-fast: .venv/installed
	$(PYTEST) $(BY_TWO) -m "not slow"

# Kills workers, nodes, drivers and heads of clusters of several nodes on this machine; some twenty minutes.
test-faults: .venv/installed
	$(BIN)/python -m pytest -m faults

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The mark is written last: a cut installation is made again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ddpm-search needs Python 3.11 or newer")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
