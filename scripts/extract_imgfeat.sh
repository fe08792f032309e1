#!/usr/bin/env bash
# Extract region features from images with the bottom-up-attention detector, in the container that UNITER's authors published:
#
#     bash scripts/extract_imgfeat.sh IMG_DIR IMG_NPY [COMMAND...]
#
# IMG_DIR contains the images. IMG_NPY, created if missing, receives one .npz per image, the input of scripts/create_imgdb.sh.
# COMMAND runs in the container, where the folders are /img and /output; the default is UNITER's command. The files belong to the
# user of the container, usually root. Exit code: docker's, which is that of COMMAND; 2 if something is missing.
#
# Environment: CUDA_VISIBLE_DEVICES, the GPU to use (default: all are visible); IAIS_BUTD_IMAGE, the image of the container
# (default: chenrocks/butd-caffe:nlvr2).

set -euo pipefail
readonly program=extract_imgfeat image=${IAIS_BUTD_IMAGE:-chenrocks/butd-caffe:nlvr2}
# shellcheck source=scripts/docker.sh
source "$(dirname "${BASH_SOURCE[0]}")/docker.sh"

(($# >= 2)) || fail "usage: extract_imgfeat.sh IMG_DIR IMG_NPY [COMMAND...]"
images=$(absolute IMG_DIR "$1")
[[ -n $(find -L "$images" -maxdepth 1 -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' \) -print -quit 2>/dev/null) ]] ||
    fail "IMG_DIR: no .jpg, .jpeg or .png file in '$images'; name the folder that contains the images"
check_image "$image" "get it with 'docker pull $image' or name another in IAIS_BUTD_IMAGE"
mkdir -p -- "$2" 2>/dev/null || fail "IMG_NPY: cannot create folder '$2'; name another"
features=$(absolute IMG_NPY "$2")
[[ -w $features ]] || fail "IMG_NPY: cannot write to '$features'; name another folder"
shift 2
(($#)) || set -- python tools/generate_npz.py --gpu 0

options=(
    --rm --init --ipc=host --workdir /src
    --mount "$(mounted "$images" /img ,readonly)"
    --mount "$(mounted "$features" /output)"
)
add_gpus
exec docker run "${options[@]}" "$image" "$@"
