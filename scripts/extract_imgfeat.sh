#!/usr/bin/env bash
# Extracts region features from pictures with the bottom-up-attention detector in the container that UNITER's authors published:
#
#     bash scripts/extract_imgfeat.sh IMG_DIR IMG_NPY [COMMAND...]
#
# IMG_DIR has the pictures, IMG_NPY (made if need be) gets one .npz a picture: what scripts/create_imgdb.sh takes. The container
# sees them as /img and /output. COMMAND is what is run in it, by default what UNITER runs; another tool of the same kind needs
# another command. The files belong to the container's user, as a rule root. Exit code: docker's, which is the command's; 2 when
# something is missing.
#
# Environment: CUDA_VISIBLE_DEVICES, the GPU to use (all are seen when unset); IAIS_BUTD_IMAGE, the container's image
# (chenrocks/butd-caffe:nlvr2).

set -euo pipefail
readonly program=extract_imgfeat
# shellcheck source=scripts/docker.sh
source "$(dirname "${BASH_SOURCE[0]}")/docker.sh"

(($# >= 2)) || fail "usage: extract_imgfeat.sh IMG_DIR IMG_NPY [COMMAND...]"
pictures=$(absolute IMG_DIR "$1")
[[ -n $(find -L "$pictures" -maxdepth 1 -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' \) -print -quit 2>/dev/null) ]] ||
    fail "IMG_DIR: no .jpg, .jpeg or .png file in '$pictures'; name the folder that holds the pictures"
readonly image=${IAIS_BUTD_IMAGE:-chenrocks/butd-caffe:nlvr2}
check_image "$image" "get it with 'docker pull $image' or name another in IAIS_BUTD_IMAGE"
mkdir -p -- "$2" 2>/dev/null || fail "IMG_NPY: folder '$2' cannot be made; name another"
features=$(absolute IMG_NPY "$2")
[[ -w $features ]] || fail "IMG_NPY: '$features' cannot be written to; name another folder"
shift 2

options=(
    --rm --init --ipc=host --workdir /src
    --mount "$(mounted "$pictures" /img ,readonly)"
    --mount "$(mounted "$features" /output)"
)
add_gpus
if (($# == 0)); then
    set -- python tools/generate_npz.py --gpu 0
fi
exec docker run "${options[@]}" "$image" "$@"
