# make run              install memtail and run the digits experiment to its scores and report
# make test             install the development tools and run the unit and integration tests
# make test-all         also the system tests: runs, services, faults
# make test-slow        slow tests, which repeat quick ones on larger inputs
# make test-gpu         what only a GPU can say, and the same on the CPU (needs a CUDA device, else these tests are skipped)
# make coverage         line coverage of all tests, child processes included
# make lint             ruff, import-linter, hadolint and mypy
# make docs             build the documentation in site/; warnings are errors, and no page may load anything from another host
# make bench            benchmarks against baselines (ROW=name: one row, ROW=list: the names)
# make bench-gpu        measurements on one GPU in less than eight minutes (ARGS="mnist digits": some rows; WHEELS=folder: installs from wheels)
# make e2e              docker compose up, from the build to the scores (needs Docker with the compose plugin)
# make test-kubernetes  the chart and the autoscaling of workers on a real API server with simulated nodes (ARGS="-m slow": the slow tests)
# make test-node        the images and the chart on a real node, with faults, in half an hour (needs root; building its tools takes up to an hour)
# make test-lowest      the tests with the lowest versions that pyproject.toml allows
# make test-python      the tests with another Python (PYTHON=3.13)
# make lock             constraints.txt: versions and hashes of all packages that are installed
# make soak             ten minutes of random faults on the services, with real servers
# make scale            1,000 workers and 100,000 simulated shards on real servers and a real API server (an hour)
# make dashboards       generate Grafana's dashboards, and render them after a small run to out/dashboards
#
# Requirements are installed into .venv, and again after a change of pyproject.toml or constraints.txt; with uv if it is on PATH.

SPEC ?= examples/digits.yaml
STORE ?= memtail-store
PYTHON ?= 3.13
BIN := .venv/bin
# Tests start many processes: without compiled modules, each compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all test-slow test-gpu coverage test-kubernetes test-node test-lowest test-python lock bench bench-gpu e2e soak scale dashboards lint docs clean

run: .venv/installed-train
	$(BIN)/memtail run $(SPEC) --store $(STORE)

test: .venv/installed-dev
	$(BIN)/pytest tests/unit tests/integration -n 3 -m "not slow" $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/pytest -m "not slow" $(ARGS)

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: .venv/installed-dev
	$(BIN)/pytest tests/gpu -n 0 $(ARGS)

coverage: .venv/installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-kubernetes: .venv/installed-dev
	$(BIN)/pytest tests/kubernetes -n 0 --timeout 600 -m "not slow" $(ARGS)

test-node: .venv/installed-dev
	$(BIN)/pytest tests/node -n 0 --timeout 3600 --capture=no $(ARGS)

test-lowest: .venv/installed-dev
	./tools/test-with.sh 3.11 lowest $(ARGS)

test-python: .venv/installed-dev
	./tools/test-with.sh $(PYTHON) locked $(ARGS)

# One version for all Pythons, so that all compute equal results. URLs of package indexes depend on the user and are not written.
lock: .venv/installed-dev
	$(BIN)/python tools/requirements.py | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	  --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command 'make lock' --upgrade --output-file constraints.txt -

bench: .venv/installed-dev
	$(BIN)/python -m tests.benchmarks.bench $(ROW)

# On a machine without a network, python3 is used with what it has and with wheels that were carried there.
bench-gpu: $(if $(WHEELS),.venv-wheels,.venv/installed-dev)
	$(if $(WHEELS),PYTHONPATH=$(CURDIR):$(CURDIR)/.venv-wheels python3,$(BIN)/python) -m tests.benchmarks.gpu $(ARGS)

.venv-wheels: $(wildcard $(WHEELS)/*.whl)
	rm -rf $@
	python3 -m pip install --quiet --no-index --find-links $(WHEELS) --no-deps --target $@ $^

e2e: .venv/installed-dev
	$(BIN)/pytest tests/e2e -n 0 --timeout 1800 --capture=no $(ARGS)

soak: .venv/installed-dev
	$(BIN)/python -m tests.system.soak $(ARGS)

scale: .venv/installed-dev
	$(BIN)/python -m tests.kubernetes.scale $(ARGS)

dashboards: .venv/installed-dev
	$(BIN)/python -m services.monitoring.dashboards
	DASHBOARD_PICTURES=out/dashboards $(BIN)/pytest tests/system/test_dashboards.py -n 0 $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile
	$(BIN)/mypy

docs: .venv-docs/installed
	PYTHONPATH=. .venv-docs/bin/python tools/reference-pages.py
	NO_COLOR=1 .venv-docs/bin/zensical build --clean --strict
	.venv-docs/bin/python tools/check-site.py site README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CODE_OF_CONDUCT.md

# Without torch and development tools, whose installation would take longer than building the documentation.
.venv-docs/installed: pyproject.toml constraints.txt
	./tools/make-venv.sh .venv-docs
	.venv-docs/bin/python tools/requirements.py base docs | ./tools/install.sh .venv-docs
	@touch $@

.venv/installed-train: pyproject.toml constraints.txt
	./tools/make-venv.sh .venv
	$(BIN)/python tools/requirements.py build base train | ./tools/install.sh .venv .
	@touch $@

.venv/installed-dev: .venv/installed-train
	$(BIN)/python tools/requirements.py build base train services hf dev | ./tools/install.sh .venv .
	@touch $@

clean:
	rm -rf .venv .venv-* .cache site .coverage* .import_linter_cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
