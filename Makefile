# make train   set up everything and run the main job on real data
# make test    set up everything and run the tests; the largest: pytest -m large
#
# Both work on a bare clone: they create a virtual environment, install torch first (TORCH= overrides the requirement),
# then the rest without build isolation, which would fetch a second torch. A second call reuses what is there, unless it
# asks for another torch: that is installed in its place, and the extension is built again.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
READY := $(VENV)/.ready

# The stamp says what torch was asked for. An empty one, made by touch, says that whatever is installed is fine.
ASKED_BEFORE := $(shell cat $(VENV)/.torch 2>/dev/null)
ifneq ($(origin TORCH),file)
ifneq ($(ASKED_BEFORE),)
ifneq ($(ASKED_BEFORE),$(TORCH))
.PHONY: $(VENV)/.torch
endif
else ifneq ($(wildcard $(VENV)/.torch),)
$(info TORCH=$(TORCH) is not installed: $(VENV) has a torch of its own, remove it to install another)
endif
endif

# `make build` and `make gpu` leave the extension of another Python or torch in its place, `make clean` none: as
# _build_info.check_versions, without the time that importing torch takes.
BUILT_FOR_IT := import importlib.metadata as m, json, os, platform; \
  b = json.load(open("ltkernels/_build.json")); \
  same = b["torch"].split("+")[0] == m.version("torch").split("+")[0]; \
  print(os.path.exists("ltkernels/_C.so") and same and b["python"] == platform.python_version().rpartition(".")[0])
ifneq ($(wildcard $(READY)),)
ifneq ($(shell $(BIN)/python -c '$(BUILT_FOR_IT)' 2>/dev/null),True)
.PHONY: $(READY)
endif
endif

.PHONY: train test test-dist setup build lint format benchmark report sanitize gpu gpu-pack dist clean

train: setup
	$(BIN)/ltkernels train digits

# Two files of tests at a time: half the time on two cores. WORKERS=0 runs one after the other.
WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The source archive, and a wheel that is built from it, installed and used elsewhere: compiles the extension.
test-dist: setup
	$(BIN)/python -m pytest -m distribution tests/test_distribution.py

setup: $(READY)

$(VENV)/.torch:
	rm -f $@ $(READY)
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11)" 2>/dev/null || \
	  { echo "$(PYTHON) is no Python 3.11 or newer: make PYTHON=... names one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	@# Triton below 3.7, which torch 2.11 brings, interprets only with numpy below 2.4.
	if $(BIN)/python -m pip freeze | grep -q '^triton==3\.[0-6]\.'; then $(BIN)/python -m pip install --quiet "numpy<2.4"; fi
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja
	rm -rf build ltkernels/_C.so ltkernels/_build.json
	echo "$(TORCH)" > $@

$(READY): $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[trainer,triton,test,lint]"
	touch $@

# The extension alone, in place, with whatever Python is at hand (PYTHON=...).
build:
	$(PYTHON) setup.py build_ext --inplace

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Run on a machine that does nothing else.
benchmark: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu-raw.json; status=$$?; \
	$(BIN)/python -m benchmarks.report benchmarks/results/cpu-raw.json && exit $$status

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own.
sanitize: setup
	tests/sanitize.sh "$$(cd "$(BIN)" && pwd)/python"

# GPU tests and benchmarks with the Python at hand: no virtual environment, no download, the extension built in place.
gpu:
	$(PYTHON) -m benchmarks.run_gpu

# For a machine without network: the images that the tables need in a file a data set (LTKERNELS_DATA is the source), and
# those packages of the trainer that an installation of PyTorch seldom has.
gpu-pack: setup
	$(BIN)/ltkernels pack $(TABLES)
	$(BIN)/python -m pip download --quiet --no-deps --dest packs tyro docstring-parser typeguard typing-extensions

dist: setup
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info ltkernels/_C.so ltkernels/_build.json
