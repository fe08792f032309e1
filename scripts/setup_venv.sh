#!/usr/bin/env bash
# Create or update .venv:  scripts/setup_venv.sh run|dev
#
#   run  what training, evaluation and the demo import (requirements.txt)
#   dev  the same plus what tests and linters need (requirements-dev.txt)
#
# Requires neither root nor a compiler. Files in .venv record its state: .installed-{run,dev}, the requirements installed, and
# .made-with, the interpreter, which is absent while pip is running so that an interrupted set-up is noticed.
# Environment: PYTHON, the interpreter to use; TORCH_INDEX_URL, the package index to install torch from.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2 || :; }
fail() { say "$*" && exit 2; }

# Debian's Python has no ensurepip unless root installs python3-venv. So fetch the wheel of pip that constraints.txt pins: a wheel
# is a zip file, and Python can run the pip inside.
bootstrap_pip() {
    wheel=pip-$(sed -n 's/^pip==//p' constraints.txt)-py3-none-any.whl
    error=$(.venv/bin/python - "$wheel" 2>&1 <<'END'
import configparser, hashlib, html, http.client, os, re, sys, urllib.parse, urllib.request

wheel = sys.argv[1]
config = configparser.RawConfigParser()
config.read(["/etc/pip.conf", os.path.expanduser("~/.config/pip/pip.conf"), os.environ.get("PIP_CONFIG_FILE", "")])
index = os.environ.get("PIP_INDEX_URL") or config.get("global", "index-url", fallback="https://pypi.org/simple")
try:
    request = urllib.request.Request(f"{index.rstrip('/')}/pip/", headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=60) as page:
        link = re.search(rf'href="([^"]*{re.escape(wheel)})#sha256=(\w+)', html.unescape(page.read().decode()))
    if link is None:
        raise ValueError(f"no {wheel} with a sha256")
    content = urllib.request.urlopen(urllib.parse.urljoin(page.url, link[1]), timeout=60).read()
    if hashlib.sha256(content).hexdigest() != link[2]:
        raise ValueError(f"{wheel} does not have the sha256 that the index states")
except (OSError, ValueError, http.client.HTTPException) as error:
    sys.exit(f"{index}: {error}")
open(f".venv/{wheel}", "wb").write(content)
END
    ) || fail "cannot fetch pip: $error; set PIP_INDEX_URL to another index or install python3-venv"
    .venv/bin/python ".venv/$wheel/pip" install --quiet --no-index ".venv/$wheel"
    rm ".venv/$wheel"
}

readonly level=${1:-}
case $level in
    run) readonly file=requirements.txt ;;
    dev) readonly file=requirements-dev.txt ;;
    *) fail "usage: scripts/setup_venv.sh run|dev" ;;
esac

# Only a run tells whether an interpreter is usable: pyenv leaves shims that fail, and python3-minimal lacks modules.
identify='import os, ssl, sys, venv
assert sys.version_info >= (3, 10)
print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable))'
candidates=(python3.12 python3.11 python3.10 python3)
[[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    interpreter=$("$candidate" -c "$identify" 2>/dev/null) && break
done
[[ -n $interpreter ]] || fail "no Python 3.10 or newer with the modules venv and ssl (tried ${candidates[*]}); set PYTHON=<its path>"

# Two set-ups at a time would take each other's work for an interrupted one.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock 9
fi

if [[ $(cat .venv/.made-with 2>/dev/null) != "$interpreter" ]] || ! .venv/bin/python -c '' 2>/dev/null; then
    say "making .venv with Python $interpreter$([[ ! -e .venv ]] || echo '; the old one is unfinished, broken or of another Python')"
    rm -rf .venv
    if ! "${interpreter#* }" -m venv .venv >/dev/null 2>&1; then
        "${interpreter#* }" -m venv --clear --without-pip .venv
        bootstrap_pip
    fi
fi

requirements=$(cat requirements.txt requirements-dev.txt constraints.txt)
if [[ $(cat ".venv/.installed-$level" 2>/dev/null) != "$requirements" ]]; then
    say "installing $file into .venv"
    rm -f .venv/.made-with
    pip=(.venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt)
    # Torch alone and without dependencies, so that everything else comes from the ordinary index.
    [[ -z ${TORCH_INDEX_URL:-} ]] || "${pip[@]}" --no-deps --index-url "$TORCH_INDEX_URL" torch
    "${pip[@]}" --requirement "$file"
    echo "$requirements" >.venv/.installed-run
    [[ $level == run ]] || echo "$requirements" >.venv/.installed-dev
    echo "$interpreter" >.venv/.made-with
fi
