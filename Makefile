# `make demo` and `make test` do everything on a machine with git, make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PEERS := .venv-peers

.PHONY: install demo test test-slow lint format bench bench-full bench-peers clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	touch $(INSTALLED)

demo: install
	rm -rf runs/demo
	$(BIN)/dynams train --config examples/digits.toml

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A small grid in some minutes. With `make bench-peers` before it, other projects' loaders stand beside ours.
bench: install
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/set_up.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/indexing.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/scoring.py --workloads small
	$(BIN)/python benchmarks/proxy.py --models small_cnn resnet18
	$(BIN)/python benchmarks/selection.py

# Everything: some hours, 50 GB of disk.
bench-full: bench-peers
	$(BIN)/python benchmarks/streaming.py --full --folder runs/bench/data
	$(BIN)/python benchmarks/set_up.py
	$(BIN)/python benchmarks/set_up.py --shards 100000 --folder runs/bench/set_up
	$(BIN)/python benchmarks/set_up.py --flat --folder runs/bench/flat
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/cold.py
	$(BIN)/python benchmarks/order.py --train runs/bench/order
	$(BIN)/python benchmarks/indexing.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/proxy.py
	$(BIN)/python benchmarks/selection.py --rows 100000000
	$(BIN)/python benchmarks/selection.py --rows 1000000000 --runs 1 --only dynams
	$(BIN)/python benchmarks/teacher_student.py
	$(BIN)/python benchmarks/accuracy.py headline
	$(BIN)/python benchmarks/accuracy.py frontier
	$(BIN)/python benchmarks/accuracy.py budgets

# The peers need packages that this project must not: an environment of their own, which shares ours for the rest.
bench-peers: install
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt

clean:
	rm -rf $(VENV) $(PEERS) runs build dist *.egg-info
