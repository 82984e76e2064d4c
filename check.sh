#!/bin/sh -e
# Format, lint, types and tests, in an environment it makes itself. Arguments go to pytest.
cd "$(dirname "$0")"
# shellcheck source=environment.sh
. ./environment.sh
make_environment requirements-dev.txt
# the oldest SDK that has to work is tried beside the newest
[ -d "$venv/openai-3.3.1/openai" ] ||
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$venv/openai-3.3.1" openai==3.3.1
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/pytest" -n auto "$@"
