# `make demo` and `make test` work as the first command in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
DATA := data/demo
WHEELS := build/wheels

.PHONY: setup demo test sanitize fuzz faults lint bench gpu docs wheel clean

# The marker is newer than everything the environment and the compiled extension are made from.
SOURCES := setup.py CMakeLists.txt pyproject.toml requirements.txt requirements-mesh.txt $(wildcard csrc/*)

setup: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	@echo "== environment: $(VENV), from requirements.txt"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@$(BIN)/python -m pip install -qq --no-deps -r requirements-mesh.txt
	@echo "== build: the C++ and CUDA parts"
	@$(BIN)/python -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@

# Talking mouths -> packed shards -> pretraining without labels -> lip reading with 10 labels a word -> a page.
# Each step keeps what is finished: the same command goes on after an interruption.
demo: setup
	@echo "== demo: about twelve minutes on two cores"
	$(BIN)/avppc synth --out $(DATA)/videos --words 20 --clips-per-word 100
	$(BIN)/avppc prepare --data $(DATA)/videos --out $(DATA)/packed
	$(BIN)/avppc pretrain --data $(DATA)/packed --out $(DEMO)
	$(BIN)/avppc evaluate --run $(DEMO) --trajectories $(DATA)/videos
	$(BIN)/avppc report --run $(DEMO)

# Two processes of one thread each: most tests are too small for two threads.
test: setup $(VENV)/opencv4/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# OpenCV 4 has the cascades that 5 lacks, and no environment holds both: it gets a folder that the tests of it ask for.
$(VENV)/opencv4/.ready: requirements-opencv4.txt | setup
	@$(BIN)/python -m pip install -qq --no-deps --upgrade --target $(@D) -r $<
	@touch $@

# The operators' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer (build/sanitized): the first fault
# ends it. Leaks are not looked for: Python and torch keep what they have.
SANITIZED := build/sanitized
CXX ?= c++

sanitize: setup
	AVPPC_SANITIZE=1 AVPPC_CUDA=0 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	AVPPC_TESTED=$(SANITIZED) PYTHONPATH=$(SANITIZED) $(BIN)/pytest -q --capture=sys tests/ops \
	  -k "not triton and not compile and not gather and not peers and not cuda"

# Damaged and hostile files for every reader, ten minutes (tests/fuzz/run.py --help has more).
fuzz: setup
	$(BIN)/python tests/fuzz/run.py --seconds 600

# A kill, a full disk and a broken disk at every operation on files of every command, and a table of how many; about three
# quarters of an hour (tests/faults/run.py --help).
faults: setup
	$(BIN)/python tests/faults/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr

# On a machine with a GPU: build, tests, compute-sanitizer, benchmarks, plots; goes on where an earlier one ended.
gpu: setup
	PYTHON=$(BIN)/python benchmarks/gpu.sh

# Pages in build/site; a warning is an error.
docs: setup
	$(BIN)/python -m pip install -qq --no-deps -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# dist/ gets an sdist and a wheel, made from the sdist alone in an environment of its own; build/wheels/ the wheel with its
# manylinux tag, tried in a fresh environment. One wheel for each version of Python, with and without a GPU: built where
# nvcc is (AVPPC_CUDA=1: only there) it holds the CUDA library, which is loaded where torch has CUDA. torch's own libraries are not copied.
wheel: setup
	@$(BIN)/python -m pip install -qq --no-deps -r requirements-wheel.txt
	rm -rf dist $(WHEELS)
	PIP_CONSTRAINT=$(CURDIR)/requirements.txt $(BIN)/python -m build --outdir dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel show dist/*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir $(WHEELS) dist/*.whl
	@echo "== smoke test: a fresh environment with nothing but the wheel and what it needs"
	$(BIN)/python -m venv $(WHEELS)/env
	$(WHEELS)/env/bin/python -m pip install -qq -c requirements.txt $(WHEELS)/*.whl
	cd $(WHEELS) && env/bin/python $(CURDIR)/tests/install/smoke.py $(if $(filter 1,$(AVPPC_CUDA)),--require cuda-build)

clean:
	rm -rf build dist *.egg-info avppc/_C*.so avppc/lib
