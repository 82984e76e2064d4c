#!/bin/sh -e
# Format, lint, types, tests.
cd "$(dirname "$0")"
ruff format --check .
ruff check .
mypy
pytest "$@"
