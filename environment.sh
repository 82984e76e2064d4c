# shellcheck shell=sh
# Sourced. make_environment FILE: a virtual environment in .venv (or OMNISPEECH_VENV) with the
# pinned packages of FILE; nothing is done if it is already so. Sets $bin to its programs.

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or 3.12 is needed; set PYTHON to one" >&2
    return 1
}

# An environment whose making was interrupted has no pip that works: it is made again. A folder
# that is no environment is never cleared.
make_venv() {
    "$bin/python" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python) || return 1
    if [ -f "$venv/pyvenv.cfg" ]; then
        "$python" -m venv --clear "$venv"
    else
        "$python" -m venv "$venv"
    fi
}

make_environment() {
    venv=${OMNISPEECH_VENV:-.venv}
    bin=$venv/bin
    made_from=$venv/made-from-$1
    if cat requirements.txt "$1" pyproject.toml | cmp -s - "$made_from"; then
        return
    fi
    echo "making the environment in $venv (the first time takes some minutes)" >&2
    make_venv || return 1
    # torch first and alone: another package asking for it could bring another build
    "$bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(grep '^torch==' requirements.txt)" &&
        "$bin/python" -m pip install --quiet --disable-pip-version-check -r "$1" &&
        "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e . &&
        cat requirements.txt "$1" pyproject.toml > "$made_from"
}
