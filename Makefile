# Two commands for a fresh machine: `make quickstart` and `make test`. They need python3 with venv, make and gcc.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Tests start hundreds of interpreters. Where the environment forbids bytecode files, each compiles the package anew: a test
# run takes half as long again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart packages test check docs stress guest numa coverage bench-measures bench-cliffs bench-sparse bench-device bench-enclave bench-remote bench-trees bench-ready bench-replay bench-files man format clean

## Install into .venv, with what device memory and remote files need, and measure how fast this machine populates memory.
quickstart: $(VENV)/.installed
	$(BIN)/prefault bench --quick

## Install what the tests need, and run all tests except the long ones, in four processes: many tests wait. When a process
## crashes, only worksteal ends the run: a replaced worker of loadfile waits for ever (pytest-xdist issues 1323 and 1327).
## A test that hangs with the GIL, which no signal reaches, is ended as a crash.
test: $(VENV)/.test-installed $(VENV)/uapi/.extracted
	$(BIN)/python -m pytest -n 4 --dist worksteal -o faulthandler_exit_on_timeout=true -o faulthandler_timeout=240

## Install the Debian packages of requirements/debian.txt: tests that need one are skipped without it. As root.
packages:
	dpkg --status $$(cat requirements/debian.txt) > /dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes --no-install-recommends $$(cat requirements/debian.txt); }

## Check style, types, the layering rule, the public names, and that the documentation holds.
check: $(VENV)/.test-installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/repo-review .
	$(BIN)/python -m pytest tests/test_layering.py tests/test_public.py tests/test_docs.py

## Build the documentation's site in build/site: every link leads somewhere, every public name is in the reference, and no
## page loads anything from another host.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

## Run the long, random and large tests.
stress: $(VENV)/.test-installed $(VENV)/uapi/.extracted
	$(BIN)/python -m pytest -m 'stress or big' --timeout 900

## Run the tests of a guest under KVM in an emulated machine. Installs qemu-system-x86 and downloads a kernel (Debian, root).
guest: $(VENV)/.test-installed
	$(BIN)/python tools/kvm_machine.py $(VENV)/kvm_machine $(BIN)/python -m pytest -p no:cacheprovider -rP tests/virtio_mem/test_guest.py

## Run the tests of NUMA nodes and of fragmented memory in an emulated machine of two nodes. Installs as `make guest` does.
numa: $(VENV)/.test-installed
	$(BIN)/python tools/kvm_machine.py --nodes $(VENV)/kvm_machine $(BIN)/python -m pytest -p no:cacheprovider -rP tests/mapping/test_numa_nodes.py tests/mapping/test_fragmented_node.py

## Measure the line coverage of src, child processes included.
coverage: $(VENV)/.test-installed $(VENV)/uapi/.extracted
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=90

## Measure the populate call against C: docs/results/measures.md.
bench-measures: $(VENV)/.test-installed
	$(BIN)/python bench/measures.py

## Measure inputs that could be far slower than a simple loop in C: docs/results/cliffs.md.
bench-cliffs: $(VENV)/.test-installed
	$(BIN)/python bench/cliffs.py

## Measure sparse memory and growable arrays: docs/results/sparse.md.
bench-sparse: $(VENV)/.test-installed
	$(BIN)/python bench/sparse.py
	$(BIN)/python bench/growable.py

## Measure device memory against a page-fault handler in C: docs/results/device.md.
bench-device: $(VENV)/.test-installed
	$(BIN)/python bench/device.py

## Measure the enclave page cache: docs/results/enclave.md.
bench-enclave: $(VENV)/.test-installed
	$(BIN)/python bench/enclave.py

## Measure remote files against fsspec and bare range requests: docs/results/device.md.
bench-remote: $(VENV)/.test-installed
	$(BIN)/python bench/remote.py

## Measure trees of many small files, and `status` beside vmtouch(8), which it installs: docs/results/files.md.
bench-trees: $(VENV)/.test-installed
	command -v vmtouch > /dev/null || apt-get install -y vmtouch || true
	$(BIN)/python bench/trees.py
## Measure shared memory and arrays that are made ready: docs/results/ready.md.
bench-ready: $(VENV)/.test-installed
	$(BIN)/python bench/ready.py

## Measure bringing files into the page cache, against vmtouch and cat: docs/results/files.md. As root: it mounts file systems.
bench-files: $(VENV)/.test-installed
	command -v vmtouch > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends vmtouch; }
	$(BIN)/python bench/files.py

## Write the manual pages and the shells' completion scripts to build/share, as a wheel installs them.
man: $(VENV)/.test-installed
	$(BIN)/python tools/shell_files.py build/share

## Measure replay of recordings: docs/results/replay.md. As root: it traces.
bench-replay: $(VENV)/.test-installed
	$(BIN)/python bench/replay.py

## Fix and format the code.
format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## Remove the environment and all caches.
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[remote]'
	touch $@

# requirements/test.txt pins every package that the tests run with.
$(VENV)/.test-installed: $(VENV)/.installed requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/test.txt
	touch $@

# requirements/docs.txt pins what the site is built with.
$(VENV)/.docs-installed: $(VENV)/.test-installed requirements/docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/docs.txt
	touch $@

# The kernel's user-space headers of a recent release, newer than the distribution's, for tests/kernel/test_headers.py.
$(VENV)/uapi/.extracted: tools/uapi_headers.py requirements/headers.txt | $(VENV)/.test-installed
	$(BIN)/python tools/uapi_headers.py $(VENV)/uapi
	touch $@
