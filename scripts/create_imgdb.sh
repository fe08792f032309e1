#!/usr/bin/env bash
# Makes an image database from a folder of features, one file an image:
#
#     bash scripts/create_imgdb.sh IMG_NPY IMG_DB [OPTION of convert_imgdir.py...]
#
# The database is IMG_DB/<name of the folder IMG_NPY>.

set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")

if (($# < 2)); then
    echo "create_imgdb: usage: create_imgdb.sh IMG_NPY IMG_DB [OPTION of convert_imgdir.py...]" >&2
    exit 2
fi
if ! name=$([[ -n $1 ]] && CDPATH='' cd -- "$1" 2>/dev/null && basename "$PWD"); then
    echo "create_imgdb: IMG_NPY: no folder '$1' that can be entered; make it or name another" >&2
    exit 2
fi
exec bash "$scripts/python.sh" "$scripts/convert_imgdir.py" --img_dir="$1" --output="$2/$name" "${@:3}"
