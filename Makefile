.PHONY: test lint demo bench ci

test:
	cargo test --workspace
lint:
	ci/lint
demo:
	cargo run --release -- demo
bench:
	cargo bench
ci:
	.ci/run
