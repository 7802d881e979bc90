# What people run. `make demo` is the main job, `make test` is all tests.

CARGO ?= cargo
TARGET := x86_64-unknown-linux-gnu

.PHONY: demo test lint bench bench-check fuzz-vmm static lab lab-test tdx-test lab-memfd lab-faults cases ci-check clean

# Every guest against every policy, each case in a VM of its own.
demo:
	$(CARGO) run --release --quiet -- suite

test:
	$(CARGO) test --workspace --quiet

lint:
	$(CARGO) fmt --all --check
	cd guest-tests/images && $(CARGO) fmt --check
	cd guest-tests/linux-init && $(CARGO) fmt --check
	cd vmm/fuzz && $(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

# The engine against the bare work, as ratios; fails if one is over its limit.
bench:
	$(CARGO) bench --quiet --bench ratios

# The hot paths' instruction counts against fixtures/bench/instructions.toml; holds on any machine.
bench-check:
	$(CARGO) bench --quiet --bench instructions

# The VMM under a coverage-guided fuzzer, each target for FUZZ_SECONDS.
FUZZ_SECONDS ?= 20
fuzz-vmm:
	vmm/fuzz/run $(FUZZ_SECONDS)

# One file to copy to another machine.
static:
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --target $(TARGET)
	@echo target/$(TARGET)/release/mapgpa

# `make lab ARGS="suite"`: mapgpa in a QEMU host of its own, where /dev/kvm is missing or unfit.
ARGS ?= host
lab:
	guest-tests/lab/lab -- $(ARGS)

# Real kernels and firmware, in the lab.
lab-test: static
	guest-tests/lab/linux-tests
	guest-tests/lab/firmware-tests

# Backend tdx on the simulated TDX host, in the lab.
tdx-test:
	$(CARGO) build --release --quiet -p mapgpa -p mapgpa-simulated-host
	guest-tests/lab/tdx-tests

# Memory model guest-memfd, in the lab; skipped unless its kernel has been built (memfd-tests --build).
lab-memfd:
	guest-tests/lab/memfd-tests

# Host calls that fail, in runs of a kernel and of a TD, in the lab: 10 minutes.
lab-faults:
	guest-tests/lab/fault-tests

# The corpus, found anew.
cases:
	$(CARGO) build --release --quiet
	fixtures/cases/regenerate

# The CI recipes against the schemas and linters of their systems; needs python3 and PyPI.
ci-check:
	docs/ci/check

clean:
	$(CARGO) clean
