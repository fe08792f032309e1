#!/usr/bin/env bash
# Makes or completes .venv:  scripts/setup_venv.sh run|dev
#
#   run  what training, evaluation and the demo import    (requirements.txt)
#   dev  the same, and what tests and linters need         (requirements-dev.txt)
#
# Needs neither root nor a compiler. Three files in .venv say what state it is in:
#   .made-with           the interpreter it was made with; written once pip works in it
#   .installed-{run,dev} the text of the requirement files that were installed
#   .installing          there only while pip is at work, so that an interrupted set-up is noticed
# Environment: PYTHON, the interpreter to use; TORCH_INDEX_URL, the package index to take torch from.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv

say() { echo "setup: $*" >&2; }

# "<version> <real path>" of interpreter $1. Running it is the only reliable test: pyenv leaves shims that fail when run,
# and a Debian python3-minimal or a home-made build can lack the modules asked for here.
identify() {
    "$1" -c '
import os, ssl, sys, venv
if sys.version_info < (3, 10):
    sys.exit(1)
print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable))
' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        identify "$PYTHON" && return
        say "PYTHON=$PYTHON does not run as a Python 3.10 or newer that has the modules venv and ssl"
        return 1
    fi
    for candidate in python3.12 python3.11 python3.10 python3; do
        identify "$candidate" && return
    done
    say "no Python 3.10 or newer that has the modules venv and ssl (tried python3.12 python3.11 python3.10 python3);" \
        "install one or set PYTHON=<path of one>"
    return 1
}

requirements() { # the text that an installation of level $1 depends on
    case $1 in
        run) cat requirements.txt constraints.txt ;;
        dev) cat requirements.txt requirements-dev.txt constraints.txt ;;
    esac
}

is_sound() { # whether .venv was finished with interpreter $1 and still runs
    [[ ! -e $venv/.installing && $(cat "$venv/.made-with" 2>/dev/null) == "$1" ]] && "$venv/bin/python" -c '' 2>/dev/null
}

make_venv() { # for interpreter $1
    if [[ -e $venv ]]; then
        say "$venv is unfinished, broken or of another Python: making it again"
        rm -rf "$venv"
    fi
    say "making $venv with Python $1"
    local python=${1#* }
    # Debian's python3 has no ensurepip unless python3-venv is installed, which takes root.
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip "$venv"
        "$venv/bin/python" scripts/bootstrap_pip.py
    fi
    echo "$1" >"$venv/.made-with"
}

install() { # level $1, from requirement file $2
    say "installing $2 into $venv"
    touch "$venv/.installing"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt)
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        # Alone and without dependencies, so that everything else still comes from the ordinary index.
        "${pip[@]}" --no-deps --index-url "$TORCH_INDEX_URL" torch
    fi
    "${pip[@]}" --requirement "$2"
    requirements run >"$venv/.installed-run"
    if [[ $1 == dev ]]; then
        requirements dev >"$venv/.installed-dev"
    fi
    rm "$venv/.installing"
}

case ${1:-} in
    run) readonly level=run file=requirements.txt ;;
    dev) readonly level=dev file=requirements-dev.txt ;;
    *)
        say "usage: scripts/setup_venv.sh run|dev"
        exit 2
        ;;
esac

interpreter=$(find_python)

# Two set-ups at a time would take each other's work for an interrupted one.
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
fi

is_sound "$interpreter" || make_venv "$interpreter"
requirements "$level" | cmp --silent - "$venv/.installed-$level" || install "$level" "$file"
