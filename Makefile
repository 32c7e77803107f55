# Thaw. `make up` serves, `make test` tests, `make demo` shows; each installs what it needs first.
.PHONY: up test demo bench build setup fmt lint clean
.DEFAULT_GOAL := build

THAW := target/release/thaw
AGENT_TARGET := x86_64-unknown-linux-gnu

up: build ## serve on http://127.0.0.1:8080 until Ctrl-C
	exec $(THAW) up --example examples/hello

demo: build ## start, deploy examples/hello, call it by curl and by boto3, stop
	.ci/demo

test: build ## every test: unit, property, and end to end against real guests
	.ci/test

bench: build ## what a request costs, part by part
	$(THAW) bench

build: setup
	@echo "== build"
	cargo build --release --locked -p thaw-api -p thaw-vmm -p thaw-egress -p thaw-loadtest -p thaw-bench
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked -p thaw-agent -p thaw-bench-guest --target $(AGENT_TARGET)
	install -D -t target/release/guest target/$(AGENT_TARGET)/release/thaw-agent target/$(AGENT_TARGET)/release/thaw-bench-guest

setup: ## Debian packages and a look at cargo; does nothing when all is there
	@.ci/setup

fmt:
	cargo fmt --all

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

clean:
	cargo clean
