# Two commands do everything, set-up included: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := demo
CAPTIONS := 'captions=[name,keywords,name_zh,keywords_zh]' 'separator=" | "'
TESTS := openmoji_seen openmoji_unseen fluent_seen fluent_unseen
.DELETE_ON_ERROR:
.PHONY: demo test test-long check format clean

# --- set-up ---------------------------------------------------------------------------------------------------------

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python tools/install.py
	touch $@

# --- make demo: pictures → shards → training → evaluation → report ----------------------------------------------------

demo: $(VENV)/.installed $(DEMO)/shards/train $(TESTS:%=$(DEMO)/shards/%) $(DEMO)/shards/composition
	$(BIN)/diptych train configs/pretrain/emoji.yaml run=$(DEMO)/run data.shards=$(DEMO)/shards/train
	$(BIN)/diptych eval $(DEMO)/run --config configs/eval/emoji.yaml
	@echo "open $(DEMO)/run/report.html"

$(DEMO)/pictures: | $(VENV)/.installed
	$(BIN)/diptych data emoji $@ --overwrite

$(DEMO)/shards/train: | $(DEMO)/pictures
	$(BIN)/diptych data pack $(DEMO)/pictures/train.csv $@ $(CAPTIONS) samples_per_shard=128

$(DEMO)/shards/composition: | $(DEMO)/pictures
	$(BIN)/diptych data pack $(DEMO)/pictures/composition.csv $@ $(CAPTIONS) layout=benchmark label=label \
	  classes=$(DEMO)/pictures/composition/classnames.txt templates=$(DEMO)/pictures/templates.txt

$(DEMO)/shards/%: | $(DEMO)/pictures
	$(BIN)/diptych data pack $(DEMO)/pictures/$*.csv $@ $(CAPTIONS) layout=benchmark label=label \
	  classes=$(DEMO)/pictures/classnames.txt templates=$(DEMO)/pictures/templates.txt

# --- make test --------------------------------------------------------------------------------------------------------

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.kernels: $(VENV)/.installed
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python tools/install.py kernels
	touch $@

test: check $(VENV)/.kernels
	$(BIN)/python -m pytest -m "not slow"

test-long: check $(VENV)/.kernels
	$(BIN)/python -m pytest

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(DEMO)
