# make demo   sets everything up and runs the embedded demo
# make test   sets everything up and passes the tests
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
OUT ?= runs/demo
DEMO_OPTIONS ?=
TORCH_OPTIONS ?=

.PHONY: demo test slow lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch $(TORCH_OPTIONS)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(RUN) vlm_zoo.cli demo --out $(OUT) $(DEMO_OPTIONS)

test: $(VENV)/.installed
	$(RUN) pytest

slow: $(VENV)/.installed
	$(RUN) pytest -m slow

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info
