# Needs Python >= 3.10, make and a C++20 compiler; everything else is installed into .venv.
#
#   VENV=/path/to/venv      use that environment with the torch it has; the rest is added to it
#   PYTHON=/path/to/python  create .venv with that Python
#   ARGS='...'              passed on to `fused-resnet bench` or to pytest

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
# CUDA kernels take minutes to compile: do that where a GPU is there to run them (see setup.py).
export FUSED_RESNET_CUDA ?= auto

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# Our own environment gets the pinned torch; one that the user names keeps what it has.
comma := ,
PINNED := $(if $(filter .venv,$(VENV)),$(comma)pinned)

EXAMPLES_BIN := $(abspath build/examples-venv)/bin

# An editable install builds nothing: build/setup/extension compiles in place and incrementally,
# against the very torch that the environment runs. Build isolation would bring a torch of its own.
EDITABLE := FUSED_RESNET_EXTENSION=0 $(PIP) --no-build-isolation --editable

# Each file under build/setup records that a step has been done, so that it is done once.
DONE := build/setup
SOURCES := setup.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# One thread each, since JOBS processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help bench test quick test-slow sanitize certify docs examples lint format clean distclean \
  FORCE

help:
	@echo 'make bench      compare fused networks with stock torch on real photos'
	@echo 'make test       check formatting, lint and types, and run the tests'
	@echo 'make quick      the same with the quickest tests only, in less than two minutes'
	@echo 'make test-slow  the tests that take long'
	@echo 'make sanitize   the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make certify    compile the GPU kernels for every GPU and judge the machine code (no GPU)'
	@echo 'make docs       build the documentation into build/site; a warning is an error'
	@echo 'make examples   test examples/ (Ray Data, LitServe), in an environment of their own'
	@echo 'make format     format the Python and C++ sources'
	@echo 'make clean      remove what was built and cached (make distclean: .venv too)'
	@echo 'Each first sets up what it needs. VENV=, PYTHON=, ARGS=: see the top of the Makefile.'

bench: $(DONE)/bench $(DONE)/extension
	$(BIN)/fused-resnet bench $(ARGS)

test: lint $(DONE)/extension
	$(PYTEST) $(ARGS)

quick: lint $(DONE)/extension
	$(PYTEST) -m 'quick and not slow and not gpu' $(ARGS)

test-slow: $(DONE)/dev $(DONE)/extension
	$(PYTEST) -m 'slow and not gpu' $(ARGS)

# Some minutes to compile; PROBLEMS='500 1' runs 500 problems a kernel, drawn from seed 1.
sanitize:
	$(MAKE) -C tests/sanitize --jobs $(JOBS)

# Tens of minutes at first; compiled kernels stay in .cache. ARGS='--arch 90 --batch 32' does a part
# of Triton's.
certify: $(DONE)/dev
	TRITON_CACHE_DIR=$(abspath .cache/triton) $(BIN)/python -m benchmarks.certify_triton \
	  --jobs $(JOBS) $(ARGS)
	$(BIN)/python -m benchmarks.certify_cuda

docs: $(DONE)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'Built: build/site/index.html'

# Their packages are many, so they get an environment on top of this one.
examples: $(DONE)/examples $(DONE)/extension
	$(EXAMPLES_BIN)/python -m pytest examples $(ARGS)

lint: $(DONE)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(DONE)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist .cache *.egg-info fused_resnet/_C*.so
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find fused_resnet tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true

distclean: clean
	rm -rf .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python >= 3.10 is needed, found $(PYTHON): $$($(PYTHON) --version 2>&1);" \
	       "name another with PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# True while this checkout was last set up for this environment, and this environment for this
# checkout; otherwise every step is done again.
$(DONE)/pair: $(BIN)/python FORCE
	@mkdir -p $(@D)
	@state='$(BIN) FUSED_RESNET_CUDA=$(FUSED_RESNET_CUDA)'; mark=$(abspath $(VENV))/.fused-resnet; \
	if [ "$$state" != "$$(cat $@ 2> /dev/null)" ] || [ '$(CURDIR)' != "$$(cat $$mark 2> /dev/null)" ]; \
	then echo "$$state" > $@ && echo '$(CURDIR)' > $$mark; fi

$(DONE)/base: $(DONE)/pair pyproject.toml
	@echo 'Installing torch and the package into $(VENV): the first time, gigabytes and minutes.'
	$(PIP) 'setuptools>=77' ninja
	$(EDITABLE) '.$(if $(PINNED),[pinned])'
	@touch $@

$(DONE)/bench: $(DONE)/base
	$(EDITABLE) '.[bench$(PINNED)]'
	@touch $@

$(DONE)/dev: $(DONE)/base
	$(EDITABLE) '.[test,lint$(PINNED)]'
	@touch $@

$(DONE)/docs: $(DONE)/base
	$(EDITABLE) '.[docs$(PINNED)]'
	@touch $@

$(DONE)/examples: $(DONE)/dev examples/ray_batch/requirements.txt examples/serve/requirements.txt
	$(BIN)/python -m venv build/examples-venv
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; \
	  print(sysconfig.get_path('purelib'))")')" \
	  > $$($(EXAMPLES_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(EXAMPLES_BIN)/python -m pip --disable-pip-version-check --quiet install \
	  -r examples/ray_batch/requirements.txt -r examples/serve/requirements.txt
	@touch $@

$(DONE)/extension: $(DONE)/base $(SOURCES)
	@echo 'Compiling the extension (log: $@.log).'
	@PATH="$(BIN):$$PATH" $(BIN)/python setup.py build_ext --inplace > $@.log 2>&1 || \
	  { cat $@.log; exit 1; }
	@grep '^warning: fused_resnet' $@.log || true
	@touch $@
