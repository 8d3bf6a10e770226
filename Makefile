# make demo        set up and run the main job        make test       set up, then ruff, mypy, import-linter, pytest
# make test-slow   the slow marker                    make bench      every benchmark, results under benchmarks/results/
# make soak        a million samples through a server, every answer compared (SOAK="--samples N" for fewer)
#
# PYTHON=...      interpreter for the environment (default python3)
# SYSTEM_SITE=1   use the packages that the interpreter has (its own torch and triton); install only what is missing
# WHEELS=dir      take those from a folder, with no network
PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?=
WHEELS ?=
SERVER := .triton/pytriton/tritonserver/bin/tritonserver
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(if $(SYSTEM_SITE),system,own)

.PHONY: demo test test-slow bench soak setup check-prerequisites clean

demo: setup
	@$(BIN)/gpuops demo $(DEMO)

test: setup
	@echo "== ruff"; $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "== mypy"; $(BIN)/mypy
	@echo "== import-linter"; $(BIN)/lint-imports
	@echo "== pytest"; tools/test_halves.sh $(BIN)/pytest -q -m "not slow and not gpu" --durations=5

test-slow: setup
	@echo "== pytest, slow"; $(BIN)/pytest -q -m "slow and not gpu" --durations=5

bench: setup
	@for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

soak: setup
	@$(BIN)/python benchmarks/soak_serving.py $(SOAK)

setup: check-prerequisites $(STAMP) $(SERVER)

check-prerequisites:
	@tools/check_prerequisites.sh $(PYTHON)

ifeq ($(SYSTEM_SITE),)
$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt
	@echo "== environment in $(VENV) (about 2.7 GB; several minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install -q -c constraints.txt -c constraints-cpu.txt -e ".[all]" --group dev
	@touch $@
else
$(STAMP): pyproject.toml
	@echo "== environment in $(VENV), with the packages of $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages --without-pip $(VENV)
	@tools/install_wheels.sh $(PYTHON) $(VENV) "$(WHEELS)"
	@touch $@
endif

$(SERVER):
	@echo "== embedded tritonserver in .triton (for loopback only)"
	@tools/get_tritonserver.sh "$(PYTHON)" "$(VENV)" .triton "$(WHEELS)"

clean:
	rm -rf $(VENV) .triton out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
