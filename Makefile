# Every target makes its own environment first; that is quick once it exists.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The torch of .venv: the release that most was tried with, of those that pyproject.toml allows. On Linux PyPI has CUDA
# builds, of gigabytes. A small one without CUDA:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup TORCH='torch==2.13.0+cpu'
TORCH ?= torch>=2.6,<2.14
# For make test-torch: the first and the last release that pyproject.toml allows, and what is run with each of them.
TORCHES ?= 2.6.0 2.14.1
TORCH_TESTS ?= tests/simulate/layers tests/simulate/optim tests/simulate/comm tests/simulate/methods \
	tests/simulate/training tests/simulate/measure tests/simulate/doctor tests/launch \
	tests/ltecli/commands/test_train.py tests/ltecli/commands/test_resume.py tests/ltecli/commands/test_doctor.py

.PHONY: setup demo demo-vision test test-all test-processors test-torch mutants frozen frozen-record lint docs bench gpu clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[dev]'
	touch $@

# The plan itself takes Muon, its rate, int8 messages and the schedule's end (simulate/planning/best_known.py). The batch
# is pinned, so that the run does not depend on what was measured before.
DEMO = --rank 48 --set train.micro_batch=1 --set method.draws=columns --set method.merge_transport=gather

demo: $(READY)
	$(BIN)/lte plan --tokens 400_000 $(DEMO) --out run.toml --force
	rm -rf runs/demo
	$(BIN)/lte train run.toml --out runs/demo
	$(BIN)/lte report runs/demo

demo-vision: $(READY)
	mkdir -p runs
	$(BIN)/python bench/studies/vision.py run --data digits --jobs 2 --results runs/vision.jsonl

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests share what it makes, so they stay together; in the order of their names, since the files with the fewest
# tests, which come last otherwise, take longest: they start processes.
PYTEST = $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The site, in site/. A link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs site

test: lint
	$(PYTEST)

test-all: lint test-processors test-torch
	$(PYTEST) -m ''
	$(BIN)/python tests/mutants.py

mutants: $(READY)
	$(BIN)/python tests/mutants.py

# Plans, losses, counted bytes, old run folders and keys that a change of places and names must leave as they are.
frozen: $(READY)
	$(BIN)/python -m tests.frozen.record --check

# Only where a change of numbers is meant; the commit says why.
frozen-record: $(READY)
	$(BIN)/python -m tests.frozen.record

# What computes, with the kernels that libraries have for lesser processors, and with other numbers of threads. Each line:
# threads, torch's own kernels, oneDNN's, MKL's. bitsandbytes heeds none of them (docs/accuracy.md).
test-processors: $(READY)
	$(call with_kernels,1,default,SSE41,SSE4_2)
	$(call with_kernels,3,avx2,AVX2,AVX2)
	$(call with_kernels,1,,AVX512_CORE,AVX512)
	$(call with_kernels,3,,,)

with_kernels = LTE_TEST_THREADS=$(1) OMP_NUM_THREADS=$(1) OMP_WAIT_POLICY=passive $(if $(2),ATEN_CPU_CAPABILITY=$(2)) \
	$(if $(3),ONEDNN_MAX_CPU_ISA=$(3)) $(if $(4),MKL_ENABLE_INSTRUCTIONS=$(4)) \
	$(BIN)/pytest --numprocesses 2 -m 'numeric and not slow'

# With other releases of torch, each in an environment of its own beside .venv.
test-torch: $(TORCHES:%=test-torch-%)

test-torch-%: .venv-torch-%/.ready
	.venv-torch-$*/bin/python -c "import torch; print('torch', torch.__version__)"
	.venv-torch-$*/bin/pytest --numprocesses 2 --dist loadfile $(TORCH_TESTS)

.PRECIOUS: .venv-torch-%/.ready
.venv-torch-%/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet --disable-pip-version-check 'torch==$*' --editable '.[dev]'
	touch $@

bench: $(READY)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/devices.py
	$(BIN)/python bench/allocator.py
	for family in gpt llama vit mixer; do $(BIN)/lte validate --only memory --quick --shapes 12 --family $$family; done
	$(BIN)/python bench/step.py --model vit_s16

# On a machine with a GPU, from the checkout and by its own Python: installs nothing (docs/gpu.md).
PART ?= all
DEVICE ?= cuda
SIZE ?= full
gpu:
	$(PYTHON) -m bench.gpu --part $(PART) --device $(DEVICE) --size $(SIZE) $(if $(FRESH),--fresh) \
		$(if $(RESULTS),--results $(RESULTS))

clean:
	rm -rf site .venv .venv-torch-* build *.egg-info runs run.toml
