# Everything here needs Python 3.11 or later and make, nothing else. All targets can be run again at no cost.
PYTHON ?= python3
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint
# To the byte, by scripts/lock.py; and then this folder itself, which has all that it needs.
LOCKED := -m pip install --quiet --disable-pip-version-check --require-hashes --requirement
OURS := -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
BIN := .venv/bin
PARITY := .venv-parity/bin
DOCS := .venv-docs/bin
NEWEST := .venv-newest/bin
RAY := .venv-ray/bin
HOSTS := .venv-hosts/bin
TPU := .venv-tpu/bin
PAGE := .venv-page/bin
# Nearly all the time of the tests is compilation of programs that run once: LLVM's quickest level halves it, and fusions
# compiled without MLIR, by one thread, halve what is left. The comparison with PyTorch compiles as users do.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
QUICK_PYTEST := XLA_FLAGS="$$XLA_FLAGS $(QUICK)" $(BIN)/python -m pytest

.PHONY: demo docs docs-commands linkcheck notebook test faults-scale faults-tuning faults-hosts ray-test parity parity-newest parity-full lint lock wheel page-test page-soak site-test golden tpu-compile clean

# Installs the package and makes variations and an edit of the pictures in examples/.
demo: .venv/.demo
	$(BIN)/python scripts/demo.py

# A process more than there are cores: some tests wait for a process that they have begun.
test: .venv/.test
	$(QUICK_PYTEST) --numprocesses=$$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

# What jobs of several processes and data sets must withstand: processes killed, stopped and late, disks that fail.
faults-scale: .venv/.test
	$(QUICK_PYTEST) tests/faults/test_batch.py tests/faults/test_parallel.py tests/faults/test_scale.py --override-ini addopts=--strict-markers

# What a tuning run must withstand: killed and stopped in the middle, checkpoints damaged, disks full.
faults-tuning: .venv/.test
	$(QUICK_PYTEST) tests/faults/test_tuning.py tests/test_tune_checkpoints.py --override-ini addopts=--strict-markers

# What hosts must withstand that lose each other, and jobs on storage that they share: network namespaces, a file system
# by FUSE and an S3 server, as root on Debian. Writes the table of docs/scale.md; ROWS="tune-cut nfs" does those alone.
faults-hosts: .venv-hosts/.done
	command -v fusermount3 || (apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends fuse3 iproute2 libfuse2)
	$(HOSTS)/python -m tests.hosts.rehearsal --write $(ROWS)

# `sdipc batch --on ray` on Ray clusters of several nodes on this machine, whose nodes and workers are killed. Ray's
# nodes talk over the machine's own address, which in a network of their own is the loopback device's.
ray-test: .venv-ray/.done
	unshare --map-root-user --net sh -c 'ip link set lo up && exec "$$@"' - $(RAY)/python -m pytest tests/ray --override-ini addopts=--strict-markers --override-ini filterwarnings=default

# Live comparison with PyTorch. Its own warnings, of which old releases have many, are no concern of ours.
parity: .venv-parity/.done
	$(PARITY)/python -m pytest tests/parity --override-ini addopts=--strict-markers --override-ini filterwarnings=ignore

# The same with the newest diffusers and transformers, which have no Flax: checkpoints as they write them.
parity-newest: .venv-newest/.done
	$(NEWEST)/python -m pytest tests/parity_newest --override-ini addopts=--strict-markers --override-ini filterwarnings=ignore

# SDXL's UNet and a single file of Stable Diffusion 1.5 at full size, which need 14 GiB of memory and minutes.
parity-full: .venv-parity/.done .venv-newest/.done
	SDIPC_FULL_SIZE=1 $(PARITY)/python -m pytest tests/parity/test_sdxl.py -k full_size --override-ini addopts=--strict-markers --override-ini filterwarnings=ignore
	SDIPC_FULL_SIZE=1 $(NEWEST)/python -m pytest tests/parity_newest/test_single_files.py -k full_size --override-ini addopts=--strict-markers --override-ini filterwarnings=ignore

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What CI installs, anew: after a change of pyproject.toml or of constraints*.txt.
lock: .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/lock.py

# Builds the wheel, installs it into an empty environment, asks it for help and opens the checkpoint that is in it.
wheel:
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	build/wheel/venv/bin/python $(PIP_INSTALL) constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/sdipc --help && venv/bin/sdipc-jax --version
	cd build/wheel && venv/bin/python -c "import sdipc_jax; print(sdipc_jax.load().config.folder)"

# The page in a real Chromium, which comes from Debian, and what its server must withstand.
page-test: .venv-page/.done
	command -v chromium || (apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core)
	$(PAGE)/python -m pytest tests/page --ignore=tests/page/test_soak.py --ignore=tests/page/test_site.py --override-ini addopts=--strict-markers --override-ini filterwarnings=default

# The site, read in the same Chromium.
site-test: docs .venv-page/.done
	$(PAGE)/python -m pytest tests/page/test_site.py --override-ini addopts=--strict-markers --override-ini filterwarnings=default

# Three minutes of requests, good and bad, in any order.
page-soak: .venv-page/.done
	$(PAGE)/python -m pytest tests/page/test_soak.py --override-ini addopts=--strict-markers --override-ini filterwarnings=default

# The site of docs/, in build/docs, with the tour's results; what Sphinx would warn of is an error.
docs: .venv-docs/.done build/tour.ipynb
	$(DOCS)/sphinx-build -W --keep-going --quiet docs build/docs

# Every command and snippet of the docs that the checkpoint that ships is enough for, small.
docs-commands: .venv/.test
	$(QUICK_PYTEST) tests/docs --numprocesses=auto --maxprocesses=4 --override-ini addopts=--strict-markers

# Addresses outside of this repository, which only the network can tell of.
linkcheck: .venv-docs/.done
	$(DOCS)/sphinx-build -b linkcheck --keep-going --quiet docs build/linkcheck

# The tour, run from its first cell to its last, in build/tour.ipynb with its pictures.
notebook: build/tour.ipynb

build/tour.ipynb: .venv/.notebook examples/tour.ipynb $(wildcard sdipc_jax/*.py sdipc_jax/*/*.py)
	mkdir -p build
	$(BIN)/jupyter-execute examples/tour.ipynb --output=$(CURDIR)/build/tour.ipynb --timeout=300

# The golden files that carry the comparison with PyTorch into `make test`.
golden: .venv-parity/.done
	$(PARITY)/python scripts/make_golden.py

# Compiles for TPU pods on a machine that has none; hours on two cores, 8 GB.
tpu-compile: .venv-tpu/.done
	JAX_PLATFORMS=cpu $(TPU)/python -m pytest tests/test_compile_tpu.py
	$(TPU)/python scripts/compile_tpu.py --topology v5e:2x4 v5e:16x16 v6e:2x4 --batch 1 4 16

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml locks/core.txt
	@echo "Installing JAX and what else is needed into .venv: 1.1 GB, a minute or a few."
	$(BIN)/python $(LOCKED) locks/core.txt
	$(BIN)/python $(OURS)
	touch $@

.venv/.test: .venv/.demo locks/test.txt
	$(BIN)/python $(LOCKED) locks/core.txt --requirement locks/test.txt
	touch $@

.venv/.lint: .venv/.demo locks/lint.txt
	$(BIN)/python $(LOCKED) locks/core.txt --requirement locks/lint.txt
	touch $@

.venv/.notebook: .venv/.demo locks/notebook.txt
	$(BIN)/python $(LOCKED) locks/core.txt --requirement locks/notebook.txt
	touch $@

.venv-parity/.done: pyproject.toml locks/parity.txt constraints-parity.txt
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python $(LOCKED) locks/parity.txt --no-deps
	$(PARITY)/python $(PIP_INSTALL) constraints-parity.txt --no-build-isolation --editable '.[parity]'
	touch $@

.venv-newest/.done: pyproject.toml locks/newest.txt constraints-newest.txt
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python $(LOCKED) locks/newest.txt --no-deps
	$(NEWEST)/python $(PIP_INSTALL) constraints-newest.txt --no-build-isolation --editable '.[newest]'
	touch $@

.venv-ray/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	$(RAY)/python $(PIP_INSTALL) constraints.txt --editable '.[test,ray]'
	touch $@

.venv-hosts/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-hosts
	@# What talks to S3 wants an older dateutil than the rest, which takes any.
	grep --invert-match '^python-dateutil==' constraints.txt > .venv-hosts/constraints.txt
	$(HOSTS)/python $(PIP_INSTALL) .venv-hosts/constraints.txt --editable '.[test,hosts-test]'
	touch $@

.venv-page/.done: pyproject.toml locks/page.txt
	$(PYTHON) -m venv .venv-page
	$(PAGE)/python $(LOCKED) locks/page.txt
	$(PAGE)/python $(OURS)
	touch $@

.venv-docs/.done: pyproject.toml locks/core.txt locks/docs.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/python $(LOCKED) locks/core.txt --requirement locks/docs.txt
	$(DOCS)/python $(OURS)
	touch $@

# Not in .venv: where libtpu is installed, JAX looks for a TPU.
.venv-tpu/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	$(TPU)/python $(PIP_INSTALL) constraints.txt --editable '.[test,tpu]'
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-page .venv-parity .venv-hosts .venv-newest .venv-ray .venv-tpu build out
