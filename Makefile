# make setup   creates the Python environment .venv; once
# make demo    runs/demo.sh: steps 0 to 3 on the drawn world, in two to three minutes; report: output/demo/report.html
# make tour    runs/tour.sh: the same with more images, compares three networks; report: output/tour/report.html
# make test    runs lint and all tests
# make docs    writes the option tables of docs/ from the settings
# make lint, make format, make clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The Python that creates .venv: found before .venv/bin is put first on PATH.
PYTHON := $(or $(PYTHON),$(shell command -v python3))
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -q

.PHONY: help setup demo tour test docs lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: .venv/installed

# The stamp is newer than requirements.txt if .venv contains all its packages. pydensecrf2 may fail to build.
.venv/installed: requirements.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'error: Python 3.10 or newer is required; select one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo 'error: this Python has no venv module; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing the packages of requirements.txt into .venv. The first time, this downloads several GB.'
	$(PYTHON) -m venv --clear .venv
	@grep -v '^pydensecrf2' requirements.txt > .venv/required.txt
	@grep '^pydensecrf2' requirements.txt > .venv/optional.txt
	$(PIP) -r .venv/required.txt
	@$(PIP) -r .venv/optional.txt 2> .venv/optional.log || { \
		echo 'note: pydensecrf2 was not installed: building it from source failed (.venv/optional.log).'; \
		echo '      Without it, --crf_backend pydensecrf and the tests that compare with it are unavailable.'; \
		echo '      All steps run: their dense CRF uses numba or torch. To add it, install a C++ compiler and the'; \
		echo '      Python headers (Debian, Ubuntu: apt install g++ python3-dev), then: .venv/bin/pip install pydensecrf2'; }
	@touch $@

demo tour: setup
	bash runs/$@.sh
	@echo "Open $(CURDIR)/output/$@/report.html in a browser."

test: setup lint
	python -m pytest -n 2 --dist loadfile

docs: setup
	python -m foundation.docs

lint: setup
	ruff check .

format: setup
	ruff check --fix .

clean:
	rm -rf .venv output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
