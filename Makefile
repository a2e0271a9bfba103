# make demo: set up and run the main job. make test: set up and pass the tests. Nothing else is needed first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-faults benchmarks lint clean

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

# Kills workers, nodes, drivers and heads of clusters of several nodes on this machine; 40 to 50 minutes.
test-faults: .venv/installed
	$(BIN)/python -m pytest -m faults

# The figures of docs/results measured anew: hours on two cores, with nothing else at work. Where a bar is missed
# the script says so, and the rest goes on. CIFAR10 is parquet:PATH of its training files; recorded curves are not made
# again.
CIFAR10 ?= parquet:/data/cifar10/train-*.parquet
MEASURE := $(BIN)/python -m benchmarks.
RUN := $(BIN)/ddpm-search run
RUNS := runs/benchmarks-$(shell git rev-parse --short HEAD)

benchmarks: .venv/installed
	-$(MEASURE)train_throughput "$(CIFAR10)"
	-$(MEASURE)sampling_throughput
	-$(MEASURE)pool_or_ray_data
	-$(MEASURE)demo
	-$(MEASURE)orchestration
	-$(MEASURE)simulate_scale
	-$(MEASURE)soak
	-$(MEASURE)search_efficiency compare
	-$(MEASURE)calibration
	-$(RUN) digits --name agree --storage $(RUNS) --set trials=16 --set early_stopping.scheduler=none
	-$(MEASURE)rank_agreement $(RUNS)/agree
	-$(RUN) study-digits --storage $(RUNS)
	-$(RUN) study-digits --name study-digits-search --storage $(RUNS) --set "known_points=[]" --set trials=200 \
		--set budget.worker_hours=$$($(MEASURE)study --cost $(RUNS)/study-digits) \
		--set budget.reserve=0.35 --set early_stopping.scheduler=asha \
		--set "early_stopping.rungs=[0.111, 0.333]" --set final.top=3 --set final.confirm.top=2
	-$(MEASURE)study $(RUNS)/study-digits $(RUNS)/study-digits-search
	$(MEASURE)tables

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
