#!/usr/bin/env bash
# Runs Python with these arguments:  scripts/python.sh PROGRAM [ARGUMENT...]
#
# It is the one that PYTHON names, or .venv/bin/python if there, or the first of python3.12 python3.11 python3.10 python3 that is
# 3.10 or newer. Exit code: Python's; 2 when there is none.

set -euo pipefail

works() { # whether interpreter $1 is new enough; pyenv leaves shims that fail when run
    "$1" -ISc 'import sys; sys.exit(sys.version_info < (3, 10))' &>/dev/null
}

if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
else
    candidates=("$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" python3.12 python3.11 python3.10 python3)
fi
for candidate in "${candidates[@]}"; do
    if works "$candidate"; then
        exec "$candidate" "$@"
    fi
done
echo "error: no Python 3.10 or newer (tried ${candidates[*]}); install one or set PYTHON=<path of one>" >&2
exit 2
