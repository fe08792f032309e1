# shellcheck shell=bash
# What the scripts that start a container share; they source it, with their own name in $program.

# shellcheck disable=SC2154
fail() {
    echo "$program: $*" >&2
    exit 2
}

absolute() { # the path of folder $2, which the caller gave for $1
    ([[ -n $2 ]] && CDPATH='' cd -- "$2" 2>/dev/null && pwd -P) || fail "$1: no folder '$2' that can be entered; make it or name another"
}

mounted() { # the value of --mount for folder $1 at $2, with options $3: fields of CSV, where commas and quotes need quotes
    echo "type=bind,\"source=${1//\"/\"\"}\",target=$2${3:-}"
}

check_image() { # that docker runs and has image $1; $2 says how to get it
    command -v docker >/dev/null || fail "no docker; install it (https://docs.docker.com/engine/install)"
    docker info >/dev/null 2>&1 ||
        fail "docker's engine does not answer; start it, and join the group docker if only root may use it ('docker info' says more)"
    docker image inspect "$1" >/dev/null 2>&1 || fail "no image '$1'; $2"
}

add_gpus() { # to the array options: those that CUDA_VISIBLE_DEVICES names, all when it is unset, none when it is empty
    local devices=${CUDA_VISIBLE_DEVICES-all} runtimes
    case ${devices// /} in
        '' | -1*)
            # NVIDIA's images ask for all, and get them where NVIDIA's runtime is docker's default.
            options+=(--env NVIDIA_VISIBLE_DEVICES=void)
            return
            ;;
    esac
    runtimes=$(docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}')
    if [[ " $runtimes" != *' nvidia '* ]] && ! command -v nvidia-ctk nvidia-container-cli >/dev/null; then
        fail "no NVIDIA container toolkit, which GPUs need; install it" \
            "(https://docs.nvidia.com/datacenter/cloud-native/container-toolkit) or set CUDA_VISIBLE_DEVICES= to use none"
    fi
    if [[ $devices == all ]]; then
        options+=(--gpus all)
    else
        options+=(--gpus "\"device=${devices// /}\"")
    fi
}
