#!/bin/sh -e
# Format, lint, types and tests, in an environment it makes itself. Arguments go to pytest.
cd "$(dirname "$0")"
# shellcheck source=environment.sh
. ./environment.sh
make_environment requirements-dev.txt
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/pytest" -n auto "$@"
