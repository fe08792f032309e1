#!/usr/bin/env bash
# Starts the container of the Dockerfile with data and code in it, either way:
#
#     bash   launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]
#     source launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]
#
# The four folders become /txt, /img, /storage and /pretrain (only /storage can be written to), and this repository /src.
# COMMAND is run there as the calling user; without one, an interactive bash. The exit code is docker's, which is the
# command's; 2 when something is missing.
#
# Environment: CUDA_VISIBLE_DEVICES, the GPUs that are seen inside (all when unset, none when empty); IAIS_IMAGE, the image's
# name (iais).

# Sourced, it must leave nothing behind in a shell that may not be bash: so the work is always done in a bash of its own.
if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'bash "${(%):-%x}" "$@"'
    return
elif [ -z "${BASH_VERSION:-}" ]; then
    echo "launch_container: run or source it with bash or zsh" >&2
    return 2
elif [ "${BASH_SOURCE[0]}" != "$0" ]; then
    bash "${BASH_SOURCE[0]}" "$@"
    return
fi

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly root

readonly program=launch_container
# shellcheck source=scripts/docker.sh
source "$root/scripts/docker.sh"

if (($# < 4)); then
    fail "usage: launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]"
fi
txt_db=$(absolute TXT_DB "$1")
img_db=$(absolute IMG_DB "$2")
output=$(absolute OUTPUT "$3")
pretrained=$(absolute PRETRAINED "$4")
shift 4
[[ -w $output ]] || fail "OUTPUT: '$output' cannot be written to; name another folder"

readonly image=${IAIS_IMAGE:-iais}
check_image "$image" "build it with 'docker build --tag $image \"$root\"' or name another in IAIS_IMAGE"

options=(
    --rm --init --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)" --workdir /src
    --mount "$(mounted "$root" /src)"
    --mount "$(mounted "$txt_db" /txt ,readonly)"
    --mount "$(mounted "$img_db" /img ,readonly)"
    --mount "$(mounted "$output" /storage)"
    --mount "$(mounted "$pretrained" /pretrain ,readonly)"
)

add_gpus

if [[ -t 0 && -t 1 ]]; then
    options+=(--interactive --tty)
elif (($# == 0)); then
    fail "no COMMAND, and no terminal for an interactive bash"
fi
exec docker run "${options[@]}" "$image" "${@:-bash}"
