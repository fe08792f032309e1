#!/usr/bin/env bash
# Start the container of the Dockerfile with data and code mounted, in either way:
#
#     bash   launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]
#     source launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]
#
# The four folders are mounted as /txt, /img, /storage and /pretrain (all but /storage read-only), this repository as /src.
# COMMAND runs there as the calling user; the default is an interactive bash. Exit code: docker's, which is that of COMMAND; 2 if
# something is missing.
#
# Environment: CUDA_VISIBLE_DEVICES, the GPUs visible inside (default: all; empty: none); IAIS_IMAGE, the name of the image
# (default: iais).

# When sourced, change nothing in the calling shell, which may be zsh: do the work in a separate bash.
if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'bash "${(%):-%x}" "$@"'
    return
elif [ -z "${BASH_VERSION:-}" ]; then
    echo "launch_container: run or source this script with bash or zsh" >&2
    return 2
elif [ "${BASH_SOURCE[0]}" != "$0" ]; then
    bash "${BASH_SOURCE[0]}" "$@"
    return
fi

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly root program=launch_container image=${IAIS_IMAGE:-iais}
# shellcheck source=scripts/docker.sh
source "$root/scripts/docker.sh"

(($# >= 4)) || fail "usage: launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED [COMMAND...]"
txt_db=$(absolute TXT_DB "$1")
img_db=$(absolute IMG_DB "$2")
output=$(absolute OUTPUT "$3")
pretrained=$(absolute PRETRAINED "$4")
shift 4
[[ -w $output ]] || fail "OUTPUT: cannot write to '$output'; name another folder"
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
    fail "without a COMMAND, run from a terminal: an interactive bash requires one"
fi
exec docker run "${options[@]}" "$image" "${@:-bash}"
