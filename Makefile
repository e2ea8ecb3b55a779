# Every target makes its own environment first; that is quick once it exists.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-vision test test-all mutants frozen frozen-record lint bench clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/lte plan --out run.toml --force
	rm -rf runs/demo
	$(BIN)/lte train run.toml --out runs/demo
	$(BIN)/lte report runs/demo

demo-vision: $(READY)
	mkdir -p runs
	$(BIN)/python bench/vision.py run --data digits --jobs 2 --results runs/vision.jsonl

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-all: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m ''
	$(BIN)/python tests/mutants.py

mutants: $(READY)
	$(BIN)/python tests/mutants.py

# Plans, losses, counted bytes, old run folders and keys that a change of places and names must leave as they are.
frozen: $(READY)
	$(BIN)/python -m tests.frozen.record --check

# Only where a change of numbers is meant; the commit says why.
frozen-record: $(READY)
	$(BIN)/python -m tests.frozen.record

bench: $(READY)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/devices.py
	for family in gpt llama vit mixer; do $(BIN)/lte validate --only memory --quick --shapes 12 --family $$family; done
	$(BIN)/python bench/studies.py least-squares
	$(BIN)/python bench/step.py --model vit_s16

clean:
	rm -rf .venv build *.egg-info runs run.toml
