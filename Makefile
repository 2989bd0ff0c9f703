# Everything works on a fresh machine with Python 3.11+, make and a C++20 compiler; the rest is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PROMPT ?= Tom has 48 apples and buys 27 more. How many apples does he have now?

BIN     = $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
CHECKS := $(wildcard tests/*/*_check.cc) benchmarks/limits.cc
export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)

.PHONY: run test test-peers lint format sanitize limits bench wheel wheel-check clean

run: $(VENV)/.run  ## build, then answer with the bundled demo model
	$(BIN)/pyengine-run --demo --think show "$(PROMPT)" < /dev/null

test: $(VENV)/.test  ## the whole suite
	PYENGINE_CHECKS_DIR=build/checks $(BIN)/python -m pytest $(PYTEST_ARGS)

test-peers: $(VENV)/.test  ## compare with llama.cpp (installs llama-cpp-python)
	$(BIN)/python -m pip install -q "llama-cpp-python>=0.3"
	$(BIN)/python -m pytest -m peer tests/peers $(PYTEST_ARGS)

lint: $(VENV)/.test  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests benchmarks -name '*.cc' -o -name '*.h' -o -name '*.c')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests benchmarks -name '*.cc' -o -name '*.h' -o -name '*.c')

sanitize: $(VENV)/.test  ## the C++ checks under AddressSanitizer + UndefinedBehaviorSanitizer, the pool under ThreadSanitizer
	$(BIN)/cmake -S . -B build/asan -DPE_BUILD_PYTHON=OFF -DPE_BUILD_TESTS=ON -DPE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan
	build/asan/checks/kernel_check --shapes 40
	build/asan/checks/ops_check
	build/asan/checks/attention_check
	build/asan/checks/pool_check
	build/asan/checks/prefix_check pyengine/data/demo-q8_0.gguf
	PYENGINE_CHECKS_DIR=build/asan/checks $(BIN)/python -m pytest tests/gguf -k "damage or cut or copying or typed"
	$(BIN)/cmake -S . -B build/tsan -DPE_BUILD_PYTHON=OFF -DPE_BUILD_TESTS=ON -DPE_SANITIZE=thread
	$(BIN)/cmake --build build/tsan --target pool_check --target prefix_check
	build/tsan/checks/pool_check
	build/tsan/checks/prefix_check pyengine/data/demo-q8_0.gguf

limits: $(VENV)/.test  ## what this machine can do at most: memory, arithmetic, barriers
	build/checks/limits

bench: $(VENV)/.test  ## the benchmarks, one command each; BENCH=NAME runs one, e.g. make bench BENCH="decode --synthetic r1-qwen-1.5b:q4_0"
	$(BIN)/python benchmarks/$(or $(firstword $(BENCH)),list).py $(wordlist 2,99,$(BENCH))

wheel: $(VENV)/.run
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

wheel-check: wheel  ## the built wheel, in a new environment outside the checkout
	$(PYTHON) tests/house/wheel_check.py dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One native build serves the package and the check programs.
$(VENV)/.run: $(BIN)/python $(NATIVE)
	$(BIN)/python -m pip install -q -e . -Cbuild-dir=build
	touch $@

$(VENV)/.test: $(BIN)/python $(NATIVE) $(CHECKS)
	$(BIN)/python -m pip install -q -e ".[test,dev]" -Cbuild-dir=build -Ccmake.define.PE_BUILD_TESTS=ON -Ccmake.define.PE_WERROR=ON
	touch $@ $(VENV)/.run

clean:
	rm -rf build dist $(VENV)
