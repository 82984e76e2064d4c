#!/usr/bin/env bash
# Sets everything up and starts the server.  ./build_and_run.sh --help
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
# shellcheck source=environment.sh
. ./environment.sh
# shellcheck source=container.sh
. ./container.sh

usage() {
    cat <<'TEXT'
usage: ./build_and_run.sh [--models DIR] [--port N] [--listen ADDRESS [--no-key]]
                          [--gpus WHICH | --cpu] [--small] [--quantize]
                          [--controller URL --worker-address URL] [--restart-policy NAME]
       ./build_and_run.sh --local [--once] [--models DIR] [--port N] [--device NAME]
                          [--listen ADDRESS [--no-key]]
       ./build_and_run.sh --stop

Without --local: builds the image, starts it as the container opens2s-server in place of an older
one, and waits until it answers. Needs Docker, and NVIDIA's container toolkit for the GPU.

  --models DIR   models directory, made if it is not there, mounted with -v "DIR:/models"; the server
                 runs as its owner (default: OMNISPEECH_MODELS, or $HOME/models)
  --port N       default: OMNISPEECH_PORT, or 8000
  --listen ADDRESS     of this machine (default: 127.0.0.1; 0.0.0.0 lets other machines in, who
                 need an API key: OMNISPEECH_API_KEY, or those of api-keys.toml in the models
                 directory, see docs/security.md)
  --no-key       let other machines in although there is no key
  --gpus WHICH   as docker run takes it: all, device=0 (default: all; the server uses the first)
  --cpu          no GPU: a smaller image, an answer takes long with the published models
  --small        where the models directory is empty, put the small model there that comes with
                 omnispeech, instead of downloading 22 GB (OMNISPEECH_SMALL=true says the same)
  --quantize     first make the 4-bit LLM, with the GPU to itself: for GPUs that have no room for
                 this beside the server
  --controller URL --worker-address URL   register with an OpenS2S controller, which finds this
                 server at its worker address; the controller itself runs elsewhere
  --restart-policy NAME   as docker run takes it (default: unless-stopped)
                 HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and settings (OMNISPEECH_...) of the
                 environment reach the server

  --local        run on this machine with Python alone: make the environment, start the server
                 in the background, ask it what three plus four is, write and play reply.wav
  --once         stop the server after that
  --models DIR   default: OMNISPEECH_MODELS; without it .local/models, where the small model is
                 put that comes with omnispeech: it hears sums to twenty and a few words
  --device NAME  cpu, cuda, cuda:N or auto (default: OMNISPEECH_DEVICE, or cpu)

  --stop         stop the server, in the container or of --local
TEXT
}

fail() {
    echo "build_and_run.sh: $*" >&2
    exit 1
}

# Status 1: none was running.
stop_server() {
    [ -f .local/server.pid ] || return 1
    local pid arguments
    pid=$(cat .local/server.pid)
    rm -f .local/server.pid
    arguments=$(ps -o args= -p "$pid" 2>/dev/null || tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") ||
        return 1
    # a number that another program has by now is left alone
    [[ $arguments == *model_worker.py* ]] || return 1
    kill "$pid"
    # replies under way may finish: the server ends by itself within half a minute
    for _ in $(seq 400); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

holds_small_model() {
    grep -qs '"by": "omnispeech small"' "$models/omnispeech-manifest.json"
}

# Nothing listens there: the server that answers later is ours.
check_port() {
    local reason
    reason=$("$bin/python" - "$port" "$listen" 2>&1 <<'PYTHON'
import errno, socket, sys
try:
    socket.create_server((sys.argv[2], int(sys.argv[1])))
except OSError as exc:
    sys.exit("is taken by another program" if exc.errno == errno.EADDRINUSE else exc.strerror)
PYTHON
    ) || fail "port $port ${reason:-cannot be used}; use --port N for another"
}

answers() {
    "$bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$1" 2>/dev/null
}

start_server() {
    : >.local/server.log # what the last server said is not taken for this one's
    nohup "$bin/python" model_worker.py --models "$models" --device "$device" \
        --host "$listen" --port "$port" ${keys:+--api-keys "$keys"} >.local/server.log 2>&1 </dev/null &
    local pid=$!
    echo "$pid" >.local/server.pid
    # only a server that has the port says so; another one may answer there
    until grep -q "running on http" .local/server.log && answers "$url/ready"; do
        check_alive "$pid"
        sleep 0.3
    done
    check_alive "$pid"
}

check_alive() {
    kill -0 "$1" 2>/dev/null && return
    tail -n 20 .local/server.log >&2
    fail "the server ended; the whole log is in .local/server.log"
}

# Who reaches a server without keys may use it: other machines only where that is meant.
check_listen() {
    [[ $listen =~ ^[0-9]+(\.[0-9]+){3}$ ]] ||
        fail "--listen '$listen'; allowed: an IPv4 address of this machine, or 0.0.0.0"
    [ ! -f "$models/api-keys.toml" ] || keys=$models/api-keys.toml
    if [ -n "${OMNISPEECH_API_KEY:-}${OMNISPEECH_API_KEYS:-}$keys" ]; then
        [ -z "$no_key" ] || fail "--no-key: there is one (OMNISPEECH_API_KEY, OMNISPEECH_API_KEYS" \
            "or $models/api-keys.toml); take it away, or leave --no-key out"
    elif [ -z "$no_key" ] && [[ $listen != 127.* ]]; then
        fail "with --listen $listen everybody who reaches this machine could use the server; set a" \
            "key first: export OMNISPEECH_API_KEY=\$(openssl rand -hex 24), or say --no-key"
    fi
}

check_options() {
    if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || [ "$port" -gt 65535 ]; then
        fail "--port '$port'; allowed: 1 to 65535"
    fi
    local option
    local -A without=([local]=with [container]=without)
    for option in "${!given[@]}"; do
        [ "${given[$option]}" = "$action" ] ||
            fail "$option does nothing ${without[$action]} --local; see --help"
    done
    [ -z "$cpu" ] || [ -z "${given[--gpus]:-}" ] || fail "--cpu and --gpus contradict each other"
}

# Random weights, or a small model that is not that of this version.
holds_old_model() {
    grep -qs '"by": "omnispeech tiny"' "$models/omnispeech-manifest.json" && return
    holds_small_model && [[ $(LC_ALL=C diff -rq omnispeech/small "$models" 2>&1) == *" differ"* ]]
}

# Of this version, unless somebody has put another model there.
make_small_model() {
    local old model
    if holds_old_model; then
        old=$models-old-$(date +%Y%m%d-%H%M%S)
        mv "$models" "$old"
        echo "The model of an earlier version was moved to $old: delete it if you like."
    fi
    for model in "$models/OpenS2S" "$models/OpenS2S-8bit"; do
        [ ! -d "$model" ] || [ ! -d "$models/glm-4-voice-decoder" ] || return 0
    done
    "$bin/omnispeech" small "$models"
}

# To somebody at a terminal, where there is a player; without a sound device it says nothing.
play() {
    local player
    [ -t 1 ] || return 0
    for player in afplay paplay pw-play 'aplay -q'; do
        if command -v "${player%% *}" >/dev/null; then
            # shellcheck disable=SC2086 # a program and its option
            $player "$1" 2>/dev/null || true
            return
        fi
    done
}

tell_small_model() {
    cat <<TEXT
This is the small model. Ask it sums to twenty ("what is nine minus four", then "and plus two"), or
"repeat after me apple tiger"; more stands in omnispeech/small/MODEL_CARD.md. With the published
model: $bin/omnispeech fetch --models DIR brings it, 22 GB; then ./build_and_run.sh --local --models DIR
TEXT
}

serve_locally() {
    [ -z "${OMNISPEECH_TLS_CERTIFICATE:-}" ] || fail "--local speaks http alone; for https start" \
        "model_worker.py yourself, or take the container"
    make_environment requirements.txt
    mkdir -p .local
    stop_server || true
    check_port
    if [ -z "$models" ]; then
        models=$PWD/.local/models
        make_small_model
        # so small a model is slower with more threads: they wait for each other
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    fi
    [ -z "$once" ] || trap 'stop_server || true' EXIT
    url=http://$address:$port
    start_server
    if [ -n "${OMNISPEECH_API_KEY:-}" ] || [ -z "${OMNISPEECH_API_KEYS:-}$keys" ]; then
        "$bin/omnispeech" say examples/question.wav -o "$PWD/reply.wav" --server "$url"
        play "$PWD/reply.wav"
    else
        echo "No question was asked: OMNISPEECH_API_KEY holds no key for it."
    fi
    ! holds_small_model || tell_small_model
    if [ -z "$once" ]; then
        echo "The server is running at $url (log: .local/server.log; stop it: ./build_and_run.sh --stop)"
        echo "Talk with it in a browser: $url/"
    fi
}

action=container once='' cpu='' no_key='' keys='' rootless='' gpus=all listen=127.0.0.1 restart_policy=unless-stopped
quantize='' controller=${OMNISPEECH_CONTROLLER:-} worker_address=${OMNISPEECH_WORKER_ADDRESS:-}
drain=${OMNISPEECH_DRAIN_S:-30} small=${OMNISPEECH_SMALL:-}
models=${OMNISPEECH_MODELS:-} port=${OMNISPEECH_PORT:-8000} device=${OMNISPEECH_DEVICE:-cpu}
declare -A given=()
while [ $# -gt 0 ]; do
    case $1 in
    --once | --device) given[$1]=local ;;
    --cpu | --gpus | --small | --quantize | --controller | --worker-address | --restart-policy)
        given[$1]=container
        ;;
    esac
    case $1 in
    --local) action=local ;;
    --stop) action=stop ;;
    --once) once=yes ;;
    --cpu) cpu=yes ;;
    --no-key) no_key=yes ;;
    --small) small=true ;;
    --quantize) quantize=yes ;;
    --models | --port | --device | --gpus | --listen | --controller | --worker-address | \
        --restart-policy)
        [ $# -gt 1 ] || fail "$1 needs a value"
        name=${1#--}
        printf -v "${name//-/_}" '%s' "$2"
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

if [ "$action" = stop ]; then
    stopped=''
    if stop_server; then stopped=yes; fi
    if stop_container; then stopped=yes; fi
    if [ -n "$stopped" ]; then echo "stopped"; else echo "no server was running"; fi
    exit
fi
check_options
models=${models/#'~/'/$HOME/} # quoted, or of a file that no shell has read
[ -z "$models" ] || [[ $models == /* ]] || models=$caller/$models
address=${listen/#0.0.0.0/127.0.0.1} # where the server is asked from here
if [ "$action" = local ]; then
    check_listen
    serve_locally
else
    models=${models:-$HOME/models} image=omnispeech:server${cpu:+-cpu}
    check_listen
    serve_in_container
fi
