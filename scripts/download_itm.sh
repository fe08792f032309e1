#!/usr/bin/env bash
# Fetches the published archives:  scripts/download_itm.sh STORAGE [flickr|coco|all] [--mirror URL] [--from DIR] [--jobs N]
#
# The work is scripts/download_itm.py's, which needs nothing but Python 3.10; --help says more.

set -euo pipefail

scripts=$(dirname "${BASH_SOURCE[0]}")
exec bash "$scripts/python.sh" "$scripts/download_itm.py" "$@"
