# `make demo` and `make test` need Python 3.10-3.12 and nothing else. Settings, all optional:
#   PYTHON    the interpreter that .venv is made from             make demo PYTHON=python3.12
#   PIP_ARGS  passed to `pip install`, for example another index  make demo PIP_ARGS="--extra-index-url ..."
#   ARGS      passed to the program or to pytest                  make test ARGS="-k losses"
# pip's own settings (PIP_INDEX_URL, pip.conf, ...) keep working.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.requirements-installed
DEMO_REFERENCES = $(sort $(wildcard assets/demo/*.png))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## create .venv and install requirements.txt into it

# Written last, so an install that was interrupted is taken up again; a finished one is not repeated until the pins change.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit("Python 3.10, 3.11 or 3.12 is needed, this is %d.%d: name one with PYTHON=python3.12" % v)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV) (a few minutes the first time; PIP_ARGS=-vv shows progress)"
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) -r requirements.txt
	@touch $@

demo: $(READY) ## generate outputs/demo/video.mp4 and sheet.png from the bundled references
	$(BIN)/python generate.py --task r2v-tiny --ref $(DEMO_REFERENCES) --prompt "$$(cat assets/demo/prompt.txt)" \
		--save_file outputs/demo/video.mp4 --save_sheet outputs/demo/sheet.png --base_seed 7 $(ARGS)

test: $(READY) lint ## run the checks and the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)/python -m ruff check --quiet .
	$(BIN)/python -m ruff format --quiet --check .

train: $(READY) ## train r2v-tiny on the sprite world, resuming where the last run stopped
	$(BIN)/python train_refalign.py $(ARGS)

clean: ## remove .venv and the tools' caches; results in outputs/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
