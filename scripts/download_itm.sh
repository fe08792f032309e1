#!/usr/bin/env bash
# Downloads the published archives:  scripts/download_itm.sh STORAGE [flickr|coco|all] [--mirror URL] [--from DIR] [--jobs N]
#
# Nothing has to be installed but curl and Python 3.10.12, 3.11.4 or newer; --help lists the options.

set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
exec bash "$scripts/python.sh" "$scripts/download_itm.py" "$@"
