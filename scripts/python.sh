#!/usr/bin/env bash
# Run Python 3.10 or newer:  scripts/python.sh PROGRAM [ARGUMENT...]
#
# Uses the interpreter in PYTHON if set, otherwise the first that works of .venv/bin/python, python3.12, python3.11, python3.10 and
# python3. Exit code: that of Python; 2 if there is none.

set -euo pipefail

candidates=("$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" python3.12 python3.11 python3.10 python3)
[[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    # Only a run tells: pyenv leaves shims that fail.
    if "$candidate" -ISc 'import sys; sys.exit(sys.version_info < (3, 10))' &>/dev/null; then
        exec "$candidate" "$@"
    fi
done
echo "error: no Python 3.10 or newer (tried ${candidates[*]}); install one or set PYTHON=<its path>" >&2 || :
exit 2
