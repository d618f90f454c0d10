# The commands of README.md; the work is done by the scripts in scripts/.
.PHONY: demo test check setup
.DEFAULT_GOAL := demo

demo: setup
	.venv/bin/arctic-jax generate --prompt "The capital of France is" --max-tokens 24

test: setup
	scripts/test

check: setup
	scripts/check

setup:
	@scripts/setup
