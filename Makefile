# Each target makes its own virtual environment and installs what it needs.
# Tests run in two processes. With more threads, tiny models spend their time waiting for each other.
PYTEST := -m pytest -n 2
export OMP_NUM_THREADS := 1

PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest

.PHONY: test test-oldest quickstart new-question check style clean

test: $(VENV)/installed check
	$(VENV)/bin/python $(PYTEST)

# The oldest supported Transformers, which serving engines pin; all else as in `test`.
test-oldest: $(VENV_OLDEST)/installed
	$(VENV_OLDEST)/bin/python $(PYTEST)

quickstart: $(VENV)/installed
	$(VENV)/bin/python examples/quickstart/quickstart.py --output quickstart-output

# LoRA teaches the quickstart's model another question, through `florence-vl train`.
new-question: $(VENV)/installed quickstart-output
	$(VENV)/bin/python examples/quickstart/new_question.py draw --output quickstart-question
	$(VENV)/bin/florence-vl train examples/quickstart/quickstart_lora.yaml
	$(VENV)/bin/python examples/quickstart/new_question.py compare quickstart-lora

quickstart-output:
	$(MAKE) quickstart

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV_OLDEST) quickstart-output quickstart-question quickstart-lora

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[test]'
	touch $@

$(VENV_OLDEST)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	grep -v '^transformers==' constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install --progress-bar off -c $(VENV_OLDEST)/constraints.txt 'transformers==5.19.0' -e '.[test]'
	touch $@
