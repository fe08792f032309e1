# shellcheck shell=bash
# Functions for scripts that start a container. A script sources this file after setting $program to its own name.

# shellcheck disable=SC2154
fail() {
    echo "$program: $*" >&2 || :
    exit 2
}

absolute() { # print the absolute path of folder $2, the value of argument $1
    ([[ -n $2 ]] && CDPATH='' cd -- "$2" 2>/dev/null && pwd -P) || fail "$1: cannot enter folder '$2'; create it or name another"
}

mounted() { # print the value of --mount for folder $1 at $2 with options $3; its fields are CSV, so commas and quotes need quoting
    echo "type=bind,\"source=${1//\"/\"\"}\",target=$2${3:-}"
}

check_image() { # fail unless docker runs and has image $1; $2 says how to get it
    command -v docker >/dev/null || fail "docker not found; install it (https://docs.docker.com/engine/install)"
    docker info >/dev/null 2>&1 || fail "the docker daemon does not answer (see 'docker info'); start it, or join the group docker"
    docker image inspect "$1" >/dev/null 2>&1 || fail "no image '$1'; $2"
}

add_gpus() { # add GPUs to the array options: those in CUDA_VISIBLE_DEVICES, all if it is unset, none if it is empty
    local devices=${CUDA_VISIBLE_DEVICES-all} runtimes
    case ${devices// /} in
        '' | -1*)
            # NVIDIA's images request all GPUs, and get them if NVIDIA's runtime is docker's default.
            options+=(--env NVIDIA_VISIBLE_DEVICES=void)
            return
            ;;
    esac
    runtimes=$(docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}')
    if [[ " $runtimes" != *' nvidia '* ]] && ! command -v nvidia-ctk nvidia-container-cli >/dev/null; then
        fail "GPUs require the NVIDIA Container Toolkit; install it" \
            "(https://docs.nvidia.com/datacenter/cloud-native/container-toolkit) or set CUDA_VISIBLE_DEVICES= to use none"
    fi
    if [[ $devices == all ]]; then
        options+=(--gpus all)
    else
        options+=(--gpus "\"device=${devices// /}\"")
    fi
}
