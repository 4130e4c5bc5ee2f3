# make demo   train shortly on the embedded generator, then draw the frontier (outputs/demo/)
# make test   unit tests, then every notebook under nbval
# make lab    JupyterLab, opened on notebooks/
# make lint   ruff
# The environment is .venv, made once from pyproject.toml; another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
ENV := .venv/bin/python
READY := .venv/.installed
OLD := speedrl_lab needs Python >= 3.11; name one: make PYTHON=python3.12 ...
# Two workers where pytest-xdist is there; a file stays with one worker. Notebooks come after, one by one.
WORKERS = $(shell $(ENV) -c 'import xdist' 2>/dev/null && echo --numprocesses 2 --dist loadfile)
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: env demo test lab lint

env: $(READY)

$(READY): pyproject.toml
	@test -x $(ENV) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(OLD)" >&2; exit 1; }
	test -x $(ENV) || $(PYTHON) -m venv .venv
	@$(ENV) -m pip --version >/dev/null 2>&1 || $(ENV) -m ensurepip
	$(ENV) -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@

demo: env
	$(ENV) -m speedrl_lab demo $(ARGS)

test: env
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	export SPEEDRL_PRESET=smoke SPEEDRL_OUTPUTS="$$folder" && \
	OMP_NUM_THREADS=1 $(ENV) -m pytest $(WORKERS) && \
	$(ENV) -m pytest --nbval-lax --nbval-current-env notebooks

lab: env
	$(ENV) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(AS_ROOT) $(ARGS)

lint: env
	$(ENV) -m ruff check .
