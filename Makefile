# make demo | make test | make dev | make format | make bench — each does its own set-up.
VENV ?= .venv
PY   ?= $(VENV)/bin/python
JOBS ?= $(shell nproc)

.PHONY: dev
dev: $(PY)  ## build the library and the extension in place, under python/lowbit
	$(PY) -m cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(PY)) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(dir $(PY)))/ninja -DLOWBIT_TESTS=ON --log-level=NOTICE
	$(PY) -m cmake --build build/dev -j $(JOBS)
	$(PY) -m cmake --install build/dev --prefix python > /dev/null

PEERS ?= $(PY)

.PHONY: bench
bench: dev  ## lowbit beside every peer installed in PEERS, an interpreter; results to bench/results and README.md
	$(PY) bench/run.py --python $(PEERS) --write README.md
