#!/usr/bin/env bash
# Create an image database from a folder of features, one file per image:
#
#     bash scripts/create_imgdb.sh IMG_NPY IMG_DB [OPTION of convert_imgdir.py...]
#
# The database is IMG_DB/<name of the folder IMG_NPY>.

set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")

fail() {
    echo "create_imgdb: $*" >&2 || :
    exit 2
}

(($# >= 2)) || fail "usage: create_imgdb.sh IMG_NPY IMG_DB [OPTION of convert_imgdir.py...]"
name=$([[ -n $1 ]] && CDPATH='' cd -- "$1" 2>/dev/null && basename "$PWD") ||
    fail "IMG_NPY: cannot enter folder '$1'; create it or name another"
exec bash "$scripts/python.sh" "$scripts/convert_imgdir.py" --img_dir="$1" --output="$2/$name" "${@:3}"
