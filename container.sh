# shellcheck shell=bash disable=SC2154
# Sourced by build_and_run.sh: the server in a container. Nothing but bash and Docker is needed.
# Set there, beside the options: address controller cpu drain gpus image keys listen models port
# quantize restart_policy rootless small worker_address, and what a models directory holds. Set here:
# arguments (of docker) and owner (of the models).

CONTAINER=opens2s-server
# of this machine alone: inside the container they are what the image says
NOT_PASSED=' OMNISPEECH_MODELS OMNISPEECH_HOST OMNISPEECH_PORT OMNISPEECH_SERVER OMNISPEECH_VENV
 OMNISPEECH_API_KEYS OMNISPEECH_SMALL '

# What Docker would refuse after the image is built, or misread.
check_values() {
    [[ $models != *:* ]] || fail "--models '$models'; Docker takes no path with a colon"
    [ "${OMNISPEECH_API_KEYS:-$models/api-keys.toml}" = "$models/api-keys.toml" ] ||
        fail "OMNISPEECH_API_KEYS='$OMNISPEECH_API_KEYS'; the server in the container reads" \
            "$models/api-keys.toml: copy it there, and unset the variable"
    local file
    for file in "${OMNISPEECH_TLS_CERTIFICATE:-}" "${OMNISPEECH_TLS_KEY:-}"; do
        [ -z "$file" ] || [[ $file == /models/* ]] ||
            fail "'$file'; the server in the container reads files of $models, where they are" \
                "called /models/...: put certificate and key there, and say so in the variables"
    done
    [[ $drain =~ ^[0-9]+(\.[0-9]*)?$ ]] ||
        fail "OMNISPEECH_DRAIN_S='$drain'; allowed: seconds, such as 90"
    [ -n "$controller" ] || return 0
    [ -n "$worker_address" ] || fail "--controller needs --worker-address, the URL of this server" \
        "as the controller sees it, such as http://10.0.0.2:$port"
    ! [[ $controller =~ ://(localhost|127\.|\[::1\]) ]] || fail "--controller $controller is the" \
        "container itself; of a controller on this machine: http://host.docker.internal:21001"
}

# Everything that is missing at once, each with what brings it.
require_container_runtime() {
    local missing=() info=''
    if ! command -v docker >/dev/null; then
        missing+=("Docker is not installed: https://docs.docker.com/engine/install/")
    elif ! info=$(docker info --format '{{json .Runtimes}} {{.SecurityOptions}}' 2>&1); then
        missing+=("$(daemon_advice "$info")")
    elif [ -z "$cpu" ] && [[ $info != *nvidia* ]] && ! command -v nvidia-ctk >/dev/null; then
        missing+=("Docker has no NVIDIA runtime: install nvidia-container-toolkit, then:
    sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker")
    fi
    if [ -z "$cpu" ] && ! nvidia-smi -L >/dev/null 2>&1; then
        missing+=("no NVIDIA driver answers (nvidia-smi -L): install one for this machine's GPU")
    fi
    [[ $info != *rootless* ]] || rootless=yes
    [ ${#missing[@]} -gt 0 ] || return 0
    printf 'build_and_run.sh: the server cannot run in a container here:\n' >&2
    printf '  - %s\n' "${missing[@]}" >&2
    fail "get what is missing, or use ./build_and_run.sh --local (Python alone, no Docker)" \
        "or --cpu (Docker, no GPU)"
}

daemon_advice() {
    if [[ $1 == *"permission denied"* ]]; then
        # shellcheck disable=SC2016
        echo 'this user may not use Docker: sudo usermod -aG docker "$USER", then log in again'
    else
        echo "the Docker daemon does not answer: sudo systemctl start docker (${1##*$'\n'})"
    fi
}

build_image() {
    local arguments=()
    # the CPU build of torch is a tenth of the other
    [ -z "$cpu" ] || arguments=(--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu)
    docker build --target server "${arguments[@]}" --tag "$image" . ||
        fail "the image was not built; the server that runs, if any, was left alone"
}

make_models_directory() {
    mkdir -p "$models" || fail "cannot make $models; name another directory with --models"
    local mine other
    mine=$(stat -Lc %u:%g "$models") # of what a link leads to
    other=$(find "$models/" -mindepth 1 -maxdepth 1 ! -user "${mine%:*}" ! -name lost+found -print -quit)
    [ -z "$other" ] || echo "warning: $other does not belong to the owner of $models, as whom the" \
        "server runs; if it cannot write there: sudo chown -R $mine $models" >&2
    # in a rootless daemon, root of the container is the user of this machine
    owner=${rootless:+0:0}
    owner=${owner:-$mine}
}

# The old server may hold it: that one is replaced.
check_free_port() {
    local held
    held=$(docker port "$CONTAINER" 8000/tcp 2>/dev/null) || held=''
    [[ $held == *":$port" ]] && return
    (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null || return 0
    fail "port $port is taken by another program; use --port N for another," \
        "or ./build_and_run.sh --stop if it is the server of --local"
}

is_running() {
    [ "$(docker container inspect --format '{{.State.Running}}' "$CONTAINER" 2>/dev/null)" = true ]
}

# Replies under way may finish. Status 1: none was running.
stop_container() {
    command -v docker >/dev/null && is_running || return 1
    docker stop "$CONTAINER" >/dev/null
}

# By name: a token stands on no command line.
passed_variables() {
    local name
    for name in HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE $(compgen -e OMNISPEECH_ || true); do
        [ -z "${!name:-}" ] || [[ $NOT_PASSED == *" $name "* ]] || printf -- '--env\n%s\n' "$name"
    done
}

# Of whatever runs in the image.
choose_arguments() {
    mapfile -t arguments < <(passed_variables)
    [ -z "$small" ] || arguments+=(--env "OMNISPEECH_SMALL=$small")
    [ -z "$keys" ] || arguments+=(--env OMNISPEECH_API_KEYS=/models/api-keys.toml)
    arguments+=(--init --user "$owner" --volume "$models:/models")
    if [ -n "$cpu" ]; then
        arguments+=(--env OMNISPEECH_DEVICE=cpu --env NVIDIA_VISIBLE_DEVICES=void)
    else
        arguments+=(--gpus "$gpus")
    fi
}

# With the device to itself. Status 1: it failed, and said why.
quantize_llm() {
    [ -d "$models/OpenS2S" ] || bring_models || return
    run_once python3 /app/quantize_llm_awq.py
}

bring_models() {
    if [[ ${small,,} =~ ^(true|yes|on|1)$ ]]; then
        run_once omnispeech small /models
    else
        run_once omnispeech fetch
    fi
}

# Status 1: it failed. Ctrl-C ends all of it, and not this step alone.
run_once() {
    local terminal=() status=0
    [ ! -t 1 ] || terminal=(--tty)
    docker rm --force "$CONTAINER-quantizer" >/dev/null 2>&1 || true # of a terminal that was closed
    docker run --rm --name "$CONTAINER-quantizer" "${terminal[@]}" "${arguments[@]}" "$image" "$@" ||
        status=$?
    [ "$status" -ne 130 ] || fail "stopped; no server is running now, ./build_and_run.sh starts one"
    return $((status > 0))
}

# Under a name of its own: what Docker refuses costs the old server nothing.
create_container() {
    local registered=()
    # nothing listens on a port of its own for the controller: the worker calls it
    [ -z "$controller" ] || registered=(
        --env "OMNISPEECH_CONTROLLER=$controller"
        --env "OMNISPEECH_WORKER_ADDRESS=$worker_address"
        --add-host host.docker.internal:host-gateway
    )
    docker rm "$CONTAINER-new" "$CONTAINER-old" >/dev/null 2>&1 || true # of a call that was cut short
    # stopped by force only when replies under way had their time
    docker create --name "$CONTAINER-new" --stop-timeout $((10#${drain%.*} + 15)) \
        --restart "$restart_policy" --publish "$listen:$port:8000" \
        "${arguments[@]}" "${registered[@]}" "$image" >/dev/null ||
        fail "Docker made no container, for the reason above; the server that runs, if any, was left" \
            "alone"
}

# The old one goes once Docker has started the new one. $1: yes if the old one was running: then it
# runs again where the new one cannot be started (the address is not of this machine, no such GPU).
start_container() {
    ! is_running || fail "another call has started a server meanwhile; it was left alone"
    docker rename "$CONTAINER" "$CONTAINER-old" 2>/dev/null || true
    docker rename "$CONTAINER-new" "$CONTAINER"
    if docker start "$CONTAINER" >/dev/null; then
        docker rm "$CONTAINER-old" >/dev/null 2>&1 || true
        return
    fi
    docker rm "$CONTAINER" >/dev/null
    docker rename "$CONTAINER-old" "$CONTAINER" 2>/dev/null || true
    [ -z "$1" ] || docker start "$CONTAINER" >/dev/null ||
        fail "neither the new container nor the old one can be started; Docker's reasons stand above"
    fail "the container did not start; Docker's reason stands above${1:+; the old one runs again}"
}

is_ready() {
    if [ -n "${OMNISPEECH_TLS_CERTIFICATE:-}" ]; then
        docker exec "$CONTAINER" answers /ready >/dev/null 2>&1
    else
        answers_plainly
    fi
}

answers_plainly() (
    exec 3<>"/dev/tcp/$address/$port" || exit
    printf 'GET /ready HTTP/1.0\r\n\r\n' >&3
    read -r -t 5 line <&3
    [[ $line == *" 200"* ]]
) 2>/dev/null

# Shows the log meanwhile: the first start downloads 22 GB.
wait_until_ready() {
    docker logs --follow "$CONTAINER" &
    local follower=$!
    trap 'kill "$follower" 2>/dev/null || true' EXIT
    trap 'echo; echo "the server goes on starting: docker logs -f $CONTAINER"; exit 130' INT
    until is_ready; do
        check_running
        sleep 1
    done
    kill "$follower" 2>/dev/null || true
    wait "$follower" 2>/dev/null || true
    trap - EXIT INT
}

check_running() {
    local state
    state=$(docker container inspect \
        --format '{{.State.Running}} {{.RestartCount}} {{.State.ExitCode}}' "$CONTAINER") ||
        fail "the container is gone: it was removed meanwhile, or Docker was stopped"
    [[ $state == "true 0 "* ]] && return
    docker stop "$CONTAINER" >/dev/null # it would be started again and again
    echo "the last lines of its log:" >&2
    docker logs --tail 20 "$CONTAINER" >&2 2>&1
    [ -n "$cpu" ] || [ ! -d "$models/OpenS2S" ] || [ -d "$models/OpenS2S-llm-awq" ] ||
        echo "If the GPU has no room for the model in 16 bits: ./build_and_run.sh --quantize" >&2
    fail "the server ended with status ${state##* }; the whole log: docker logs $CONTAINER"
}

tell_what_next() {
    local url=http${OMNISPEECH_TLS_CERTIFICATE:+s}://$address:$port key=''
    # shellcheck disable=SC2016 # its name, and not the key itself
    [ -z "${OMNISPEECH_API_KEY:-}$keys" ] || key=' -H "Authorization: Bearer $OMNISPEECH_API_KEY"'
    cat <<TEXT

The server is ready: $url (models: $models)
  talk:     $url/ in a browser
  ask it:   curl$key --data-binary @examples/question.wav $url/v1/speech -o reply.wav
  its log:  docker logs -f $CONTAINER
  stop it:  ./build_and_run.sh --stop
TEXT
    if [ "$listen" = 127.0.0.1 ]; then
        echo "  Other machines do not reach it: ssh -L $port:$address:$port from there is the safe" \
            "way, an API key and --listen 0.0.0.0 the other (docs/security.md)."
    fi
    if holds_small_model; then
        tell_small_container
    elif [ ! -d "$models/OpenS2S-llm-awq" ]; then
        tell_quantizing
    fi
}

tell_small_container() {
    cat <<TEXT
This is the small model: sums to twenty ("what is three plus four"), "repeat after me apple tiger",
more in $models/OpenS2S/README.md. For the published one (22 GB) in its place:
  docker exec $CONTAINER omnispeech fetch --update
  docker restart $CONTAINER
TEXT
}

tell_quantizing() {
    cat <<TEXT
Once, for a start in seconds and half the GPU memory:
  docker exec -it $CONTAINER python3 /app/quantize_llm_awq.py
  docker restart $CONTAINER
TEXT
}

serve_in_container() {
    check_values
    require_container_runtime
    make_models_directory
    check_free_port
    build_image
    choose_arguments
    create_container
    local failed='' old=''
    if stop_container; then
        old=yes
        echo "the old container is replaced; $models is kept"
    fi
    [ -z "$quantize" ] || quantize_llm || failed=yes
    start_container "$old"
    wait_until_ready
    tell_what_next
    [ -z "$failed" ] || fail "the LLM was not quantized, for the reason above; the server runs"
}
