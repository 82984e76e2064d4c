#!/usr/bin/env bash
# Sets everything up and starts the server.  ./build_and_run.sh --help
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
# shellcheck source=environment.sh
. ./environment.sh

usage() {
    cat <<'TEXT'
usage: ./build_and_run.sh --local [--once] [--models DIR] [--port N] [--device NAME]
       ./build_and_run.sh --stop

  --local        run on this machine with Python alone: make the environment, start the server
                 in the background, ask it a spoken question, write reply.wav
  --once         stop the server after that
  --models DIR   models directory (default: OMNISPEECH_MODELS; without it a small checkpoint with
                 random weights is made in .local/models: it answers with noise)
  --port N       default: 8000
  --device NAME  cpu (default), cuda, cuda:N or auto
  --stop         stop the server that --local left running
TEXT
}

fail() {
    echo "build_and_run.sh: $*" >&2
    exit 1
}

stop_server() {
    [ -f .local/server.pid ] || return 0
    local pid arguments
    pid=$(cat .local/server.pid)
    rm -f .local/server.pid
    arguments=$(ps -o args= -p "$pid" 2>/dev/null || tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") ||
        return 0
    # a number that another program has by now is left alone
    [[ $arguments == *model_worker.py* ]] || return 0
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
}

answers() {
    "$bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$1" 2>/dev/null
}

start_server() {
    "$bin/python" model_worker.py --models "$models" --device "$device" --port "$port" \
        >.local/server.log 2>&1 &
    local pid=$!
    echo "$pid" >.local/server.pid
    until answers "$url/ready"; do
        if ! kill -0 "$pid" 2>/dev/null; then
            tail -n 20 .local/server.log >&2
            fail "the server ended; the whole log is in .local/server.log"
        fi
        sleep 0.3
    done
}

action='' once='' models=${OMNISPEECH_MODELS:-} port=8000 device=cpu
while [ $# -gt 0 ]; do
    case $1 in
    --local) action=local ;;
    --stop) action=stop ;;
    --once) once=yes ;;
    --models | --port | --device)
        [ $# -gt 1 ] || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
    -h | --help)
        usage
        exit
        ;;
    *) fail "unknown option $1; see --help" ;;
    esac
    shift
done

case $action in
stop)
    stop_server
    exit
    ;;
local) ;;
*)
    usage >&2
    exit 2
    ;;
esac

make_environment requirements.txt
mkdir -p .local
stop_server
if [ -z "$models" ]; then
    models=$PWD/.local/models
    [ -d "$models" ] || "$bin/omnispeech" tiny "$models"
    # so small a model is slower with more threads: they wait for each other
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
fi
[[ $models == /* ]] || models=$caller/$models
[ -z "$once" ] || trap stop_server EXIT
url=http://127.0.0.1:$port
start_server
"$bin/omnispeech" say examples/question.wav -o reply.wav --server "$url"
if [ -z "$once" ]; then
    echo "The server is running at $url (log: .local/server.log; stop it: ./build_and_run.sh --stop)"
fi
