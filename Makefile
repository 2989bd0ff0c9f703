# Everything works on a fresh machine with Python 3.11+, make and a C++20 compiler; the rest is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PROMPT ?= Tom has 48 apples and buys 27 more. How many apples does he have now?

BIN     = $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
CHECKS := $(wildcard tests/*/*_check.cc tests/hostile/*.h) benchmarks/limits.cc
comma = ,
export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)

.PHONY: run test test-peers hostile fuzz coverage determinism determinism-aarch64 interrupts golden lint format sanitize leaks limits bench plan-memory forecast test-offline hostile-text tokenizers convert-faults valgrind faults concurrency wheel wheel-check clean

run: $(VENV)/.run  ## build, then answer with the bundled demo model
	$(BIN)/pyengine-run --demo --think show "$(PROMPT)" < /dev/null

test: $(VENV)/.test  ## the whole suite
	PYENGINE_CHECKS_DIR=build/checks $(BIN)/python -m pytest $(PYTEST_ARGS)

test-offline: $(VENV)/.test  ## the whole suite in a network namespace with nothing but a loopback interface
	PYENGINE_CHECKS_DIR=build/checks $(BIN)/python -m tests.house.offline $(PYTEST_ARGS)

test-peers: $(VENV)/.test  ## compare with llama.cpp (installs llama-cpp-python)
	$(BIN)/python -m pip install -q "llama-cpp-python>=0.3"
	$(BIN)/python -m pytest -m peer tests/peers $(PYTEST_ARGS)

determinism: $(VENV)/.test  ## the one-answer contract over its whole matrix, and the golden hashes on every tier (long)
	$(BIN)/python -m tests.determinism.golden
	$(BIN)/python -m tests.determinism.matrix

convert-faults: $(VENV)/.test  ## the converter under kill -9 at 100 random moments and on 50 full disks (minutes)
	$(BIN)/python -m tests.convert.faults

AARCH64 = aarch64-linux-gnu
determinism-aarch64: $(VENV)/.test  ## the golden hashes on an emulated aarch64 processor (ALL=1: of every format)
	@for tool in $(AARCH64)-gcc $(AARCH64)-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing: on Debian, apt-get install g++-$(AARCH64) qemu-user"; exit 1; }; done
	$(BIN)/cmake -S . -B build/aarch64 -DPE_BUILD_PYTHON=OFF -DPE_BUILD_TESTS=ON -DPE_WERROR=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_C_COMPILER=$(AARCH64)-gcc -DCMAKE_CXX_COMPILER=$(AARCH64)-g++
	$(BIN)/cmake --build build/aarch64 --target logits_check
	$(BIN)/python -m tests.determinism.golden $(if $(ALL),,--quick) \
	  --program build/aarch64/checks/logits_check --emulator "qemu-aarch64 -L /usr/$(AARCH64)"

interrupts: $(VENV)/.test  ## how long Ctrl-C takes at 200 random moments; MODEL=FILE.gguf (p99 above 250 ms fails)
	$(BIN)/python -m tests.cli.interrupts $(MODEL)

hostile-text: $(VENV)/.test  ## hostile templates, every special string x role x position, runs of 1 MiB (half an hour)
	$(BIN)/python -m tests.text.hostile

tokenizers: $(VENV)/.test  ## 1,000,000 random strings a vocabulary against the original tokenizer.json (20 minutes)
	$(BIN)/python -m tests.text.differences

golden: $(VENV)/.test  ## adds to golden.json what it lacks, after a new numerics epoch (docs/numerics.md)
	$(BIN)/python -m tests.determinism.golden --write

lint: $(VENV)/.test  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests benchmarks examples -name '*.cc' -o -name '*.h' -o -name '*.c')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests benchmarks examples -name '*.cc' -o -name '*.h' -o -name '*.c')

DEMO = pyengine/data/demo-q8_0.gguf
# The C++ checks built with sanitizers: $(call sanitized,FOLDER,SANITIZERS,CHECKS)
sanitized = $(BIN)/cmake -S . -B build/$(1) -DPE_BUILD_PYTHON=OFF -DPE_BUILD_TESTS=ON -DPE_SANITIZE=$(2) && \
  $(BIN)/cmake --build build/$(1) $(addprefix --target ,$(3))

sanitize: $(VENV)/.test  ## the C++ checks under AddressSanitizer (leaks too) + UndefinedBehaviorSanitizer, those with threads under ThreadSanitizer
	$(call sanitized,asan,address$(comma)undefined,$(notdir $(basename $(wildcard tests/*/*_check.cc))))
	build/asan/checks/kernel_check --shapes 8
	build/asan/checks/ops_check
	build/asan/checks/attention_check
	build/asan/checks/pool_check
	build/asan/checks/prefix_check $(DEMO)
	build/asan/checks/fault_check --every 20 $(DEMO)
	build/asan/checks/concurrency_check $(DEMO) forks=0  # in whose children the allocator of gcc before 14 hangs
	PYENGINE_CHECKS_DIR=build/asan/checks $(BIN)/python -m pytest tests/gguf -k "damage or cut or copying or typed"
	$(call sanitized,tsan,thread,pool_check prefix_check concurrency_check)
	build/tsan/checks/pool_check
	build/tsan/checks/prefix_check $(DEMO)
	build/tsan/checks/concurrency_check $(DEMO)

LEAKS = $(CURDIR)/build/leaks
leaks: $(VENV)/.test  ## the suite with the engine under AddressSanitizer: leaks and errors of memory (long)
	$(PYTHON) -m venv $(LEAKS)/venv
	$(LEAKS)/venv/bin/python -m pip install -q -e ".[test]" -Cbuild-dir=build/leaks -Ccmake.define.PE_BUILD_TESTS=ON \
	  -Ccmake.define.PE_SANITIZE=address,undefined
	$(BIN)/python -m tests.house.leaks $(LEAKS)/venv/bin/python $(LEAKS)/checks $(PYTEST_ARGS)

VALGRIND = valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=all --errors-for-leak-kinds=all
valgrind: $(VENV)/.test  ## the C program of the embedding test under valgrind: no error, nothing left allocated
	@command -v valgrind > /dev/null || { echo "valgrind is missing: on Debian, apt-get install valgrind"; exit 1; }
	$(CC) -std=c99 -g -Icsrc/api tests/api/embed.c build/libpyengine.so -Wl,-rpath,$(CURDIR)/build -o build/embed
	$(VALGRIND) build/embed $(DEMO) 12 1 5 6 7 8 9
	PYENGINE_ISA=scalar $(VALGRIND) build/embed $(DEMO) 12 1 5 6 7 8 9

faults: $(VENV)/.test  ## every allocation, 3,000 failing writes, 800 kills, 400 changed model files, every limit of memory (long)
	$(call sanitized,asan,address$(comma)undefined,fault_check)
	build/checks/fault_check $(DEMO)
	build/asan/checks/fault_check $(DEMO)
	$(BIN)/python -m tests.faults.writes
	$(BIN)/python -m tests.faults.changed
	$(BIN)/python -m tests.faults.memory

concurrency: $(VENV)/.test  ## 10,000 generations under ThreadSanitizer, 10,000 cancels, 2,000 destroys, 10,000 cycles (long)
	$(call sanitized,tsan,thread,concurrency_check)
	build/checks/concurrency_check $(DEMO) generations=10000 cancels=10000 destroys=2000 cycles=10000 forks=1000 changes=400
	build/tsan/checks/concurrency_check $(DEMO) generations=10000 cancels=1000 destroys=200 cycles=200 changes=60

SANITIZERS = ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
hostile: $(VENV)/.test  ## 4 million malformed models under AddressSanitizer + UndefinedBehaviorSanitizer (CASES=n of each class)
	$(BIN)/cmake -S . -B build/asan -DPE_BUILD_PYTHON=OFF -DPE_BUILD_TESTS=ON -DPE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan --target hostile_check
	$(SANITIZERS) build/asan/checks/hostile_check incidents
	$(SANITIZERS) build/asan/checks/hostile_check cut 1
	$(SANITIZERS) build/asan/checks/hostile_check integers 1
	$(SANITIZERS) build/asan/checks/hostile_check classes $(or $(CASES),10000)
	$(SANITIZERS) build/asan/checks/hostile_check bytes 1
	$(BIN)/python -m tests.hostile.text_half $(or $(CASES),10000)

NATIVE_TARGETS = reader capi state
PYTHON_TARGETS = tokenizer template safetensors chat
SECONDS = 60
fuzz: $(VENV)/.test  ## coverage-guided fuzzing with clang and atheris: SECONDS=n for each TARGET="reader capi state tokenizer ..."
	@for tool in clang clang++; do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing: on Debian, apt-get install clang llvm"; exit 1; }; done
	$(BIN)/cmake -S . -B build/fuzz -DPE_BUILD_PYTHON=OFF -DPE_FUZZ=ON -DPE_SANITIZE=address,undefined \
	  -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
	$(BIN)/cmake --build build/fuzz
	$(BIN)/python -m pip install -q "atheris>=3"
	mkdir -p $(addprefix build/fuzz/corpus/,$(NATIVE_TARGETS) $(PYTHON_TARGETS)) build/fuzz/found
	build/checks/hostile_check write build/fuzz/corpus/reader
	set -e; for target in $(or $(TARGET),$(NATIVE_TARGETS) $(PYTHON_TARGETS)); do \
	  echo "== $$target"; $(BIN)/python -m zipfile -e tests/fuzz/corpus/$$target.zip build/fuzz/corpus/$$target; case " $(NATIVE_TARGETS) " in \
	    *" $$target "*) program=build/fuzz/$${target}_fuzz;; \
	    *) program="$(BIN)/python -m tests.fuzz.python_targets $$target";; esac; \
	  $(SANITIZERS) $$program -max_total_time=$(SECONDS) -max_len=8192 -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
	    -verbosity=0 -artifact_prefix=build/fuzz/found/$$target- build/fuzz/corpus/$$target; done

COVERAGE = $(CURDIR)/build/coverage
coverage: $(VENV)/.test  ## branch coverage of the reader by its tests, the hostile files and the fuzzers' corpus
	@for tool in clang llvm-cov llvm-profdata; do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing: on Debian, apt-get install clang llvm"; exit 1; }; done
	$(PYTHON) -m venv $(COVERAGE)/venv
	CC=clang CXX=clang++ $(COVERAGE)/venv/bin/python -m pip install -q -e ".[test]" -Cbuild-dir=build/coverage \
	  -Ccmake.define.PE_BUILD_TESTS=ON -Ccmake.define.PE_COVERAGE=ON
	rm -f build/coverage/*.profraw
	mkdir -p build/fuzz/corpus/reader
	$(BIN)/python -m zipfile -e tests/fuzz/corpus/reader.zip build/fuzz/corpus/reader
	set -e; export LLVM_PROFILE_FILE=$(COVERAGE)/%4m-%p.profraw; \
	  for suite in incidents "classes 100" "cut 97" "integers 5" "bytes 101"; do \
	    build/coverage/checks/hostile_check $$suite | tail -1; done; \
	  PYENGINE_CHECKS_DIR=build/coverage/checks $(COVERAGE)/venv/bin/python -m pytest -q tests/gguf tests/model/test_schema.py; \
	  build/coverage/reader_fuzz -runs=0 build/fuzz/corpus/reader
	llvm-profdata merge -sparse build/coverage/*.profraw -o build/coverage/all.profdata
	llvm-cov report build/coverage/libpyengine.so $(addprefix -object build/coverage/,checks/hostile_check checks/gguf_check reader_fuzz) \
	  -instr-profile=build/coverage/all.profdata -show-branch-summary -show-region-summary=false -show-functions=false \
	  -ignore-filename-regex='csrc/(api|base|bindings|kernels|model|quant|runtime)|tests/|pybind11'

limits: $(VENV)/.test  ## what this machine can do at most: memory, arithmetic, barriers
	build/checks/limits

bench: $(VENV)/.test  ## the benchmarks, one command each; BENCH=NAME runs one, e.g. make bench BENCH="e2e --synthetic r1-distill-qwen-1.5b:q4_0"
	$(BIN)/python benchmarks/$(or $(firstword $(BENCH)),list).py $(wordlist 2,99,$(BENCH))

plan-memory: $(VENV)/.test  ## plans against what processes then use: make plan-memory MODELS="a.gguf b.gguf"
	$(BIN)/python -m benchmarks.plan_memory $(or $(MODELS),pyengine/data/demo-q8_0.gguf --contexts 512 --fill)

forecast: $(VENV)/.test  ## forecasts of speed against what then comes: make forecast MODELS="a.gguf b.gguf"
	$(BIN)/python -m benchmarks.forecast $(or $(MODELS),$(error MODELS is empty: which files?))

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
