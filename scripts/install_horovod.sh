#!/usr/bin/env bash
# Build horovod against the torch of a Python environment and install it there:  scripts/install_horovod.sh [PYTHON]
#
# PYTHON defaults to .venv/bin/python if that exists, otherwise python3. No-op if an intact horovod for its torch is installed.
# Requires a C++ compiler, make and Python's headers. Uses NCCL for tensors on GPUs if torch is a CUDA build, and nvcc of its
# major version and NCCL are found; otherwise Gloo alone, which handles tensors on the CPU. Wheels are kept in
# ${XDG_CACHE_HOME:-~/.cache}/iais/horovod, one per combination of versions.
#
# Exit codes: 0 installed; 1 build or installation failed; 2 no usable Python, torch or pip; 3 no C++ compiler, make or Python.h.
# Environment: CXX, the compiler; HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME, folders of CUDA and NCCL.

set -euo pipefail
shopt -s nullglob
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root version=0.28.1 sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0

say() { echo "horovod: $*" >&2 || :; }
fail() { say "${*:2}" && exit "$1"; }

# Print seven fields: torch's version, its CUDA, the C++ standard of its extensions, what else a wheel depends on, the folders of
# Python.h and of torch's NCCL, and the torch and operations of the horovod installed. Importing torch would take a second.
describe() {
    "$python" - <<'END'
import base64, hashlib, importlib.util, json, pathlib, platform, re, runpy, sys, sysconfig
from importlib import metadata

spec = importlib.util.find_spec("torch")
torch = pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
if torch is None or not (torch / "version.py").is_file():
    sys.exit(f"horovod: {sys.executable} has no torch; install it first ('make venv' does so in .venv)")
facts = runpy.run_path(str(torch / "version.py"))
standards = re.findall(r"-std=c\+\+(\d\d)", (torch / "utils/cpp_extension.py").read_text(encoding="utf-8"))
try:
    files = {file: file.read_binary() for file in metadata.files("horovod") if file.hash}
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, content).digest()).decode()
        assert digest.rstrip("=") == file.hash.value
    built_for = next(json.loads(content)["pytorch"] for file, content in files.items() if file.name == "metadata.json")
    installed = f"{built_for} {'NCCL' if any(b'ncclCommInitRank' in content for content in files.values()) else 'Gloo'}"
except Exception:  # not installed, damaged, or built for another framework
    installed = ""
platform = "-".join((sysconfig.get_config_var("SOABI"), sysconfig.get_platform(), "".join(platform.libc_ver())))
folders = (sysconfig.get_path("include"), torch.parent / "nvidia/nccl")
print(facts["__version__"], facts.get("cuda") or "", max(standards, default="17"), platform, *folders, installed, sep="|")
END
}

choose_operations() { # set operations and reason; for NCCL also cuda_home, nccl_home, nccl_library and nccl_version
    local nvcc release
    operations=Gloo nccl_version='' reason="torch is not a CUDA build"
    [[ -n $cuda ]] || return 0
    nvcc=$(PATH="${HOROVOD_CUDA_HOME:+$HOROVOD_CUDA_HOME/bin:}${CUDA_HOME:+$CUDA_HOME/bin:}/usr/local/cuda/bin:$PATH" type -P nvcc)
    nvcc=$(readlink -f "${nvcc:-/}")
    release=$("$nvcc" --version 2>/dev/null | sed -nE 's/.*release ([0-9.]+).*/\1/p')
    cuda_home=${nvcc%/bin/nvcc}
    reason="torch is built for CUDA $cuda, but nvcc in $cuda_home is ${release:-missing}; set HOROVOD_CUDA_HOME to use another"
    [[ ${release%%.*} == "${cuda%%.*}" ]] || return 0
    # Torch's own NCCL comes first: it is loaded already when horovod is imported.
    for nccl_home in ${HOROVOD_NCCL_HOME:+"$HOROVOD_NCCL_HOME"} "$torch_nccl" "$cuda_home" /usr; do
        for nccl_library in "$nccl_home"/lib{,64,/*-linux-gnu}/libnccl.so{,.2}; do
            [[ -f $nccl_home/include/nccl.h && -f $nccl_library ]] || continue
            nccl_version=$(sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$nccl_home/include/nccl.h" | paste -sd. -)
            operations=NCCL reason="CUDA $release in $cuda_home, NCCL $nccl_version in $nccl_home"
            return
        done
    done
    reason="torch is built for CUDA $cuda, but there is no nccl.h with a libnccl.so; set HOROVOD_NCCL_HOME to use one"
}

is_installed() { # sets everything that the rest needs to know of the environment
    facts=$(describe) || exit 2
    IFS='|' read -r torch cuda standard platform include torch_nccl installed <<<"$facts"
    choose_operations
    [[ $installed == "$torch NCCL" || $installed == "$torch $operations" ]]
}

find_compiler() {
    [[ -f $include/Python.h ]] || fail 3 "no $include/Python.h; install the headers of Python (python3-dev on Debian and Ubuntu)"
    command -v make >/dev/null || fail 3 "no make; install it (build-essential on Debian and Ubuntu)"
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        echo '#include <string>' | "$compiler" "-std=c++$standard" -x c++ -c -o /dev/null - 2>/dev/null && return
    done
    fail 3 "no compiler for C++$standard, which torch $torch requires; install one (g++ on Debian and Ubuntu) or set CXX"
}

build() { # the wheel into $work
    set -e
    # In a folder of their own, since the environment may hold, and an image pin, other versions of the build tools.
    PIP_CONSTRAINT='' "$python" -m pip install --target "$work/tools" --constraint "$root/constraints.txt" setuptools packaging cmake
    export PYTHONPATH=$work/tools PATH=$work/tools/bin:$PATH
    echo "horovod==$version --hash=sha256:$sha256" >"$work/source.txt"
    "$python" -m pip download --require-hashes --no-deps --no-build-isolation --no-binary horovod --dest "$work" -r "$work/source.txt"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    cd "$work/horovod-$version"

    # The last release of horovod is of 2023. Torch's headers require the C++ standard of torch's extensions, CUDA's require 17.
    sed -i.orig "s/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD $standard/" CMakeLists.txt horovod/torch/CMakeLists.txt
    sed -i.orig 's/CMAKE_CUDA_STANDARD 11/CMAKE_CUDA_STANDARD 17/' horovod/common/ops/cuda/CMakeLists.txt
    # Python 3.12 has no distutils.
    sed -i.orig "s/from distutils.*get_python_inc()/import sysconfig; print(sysconfig.get_path('include')/" horovod/torch/CMakeLists.txt
    sed -i.orig 's/from distutils.spawn import find_executable/from shutil import which as find_executable/' horovod/runner/js_run.py
    # Debug information makes the library ten times as large. Paths of this build, and instructions of this processor (below),
    # have no place in a wheel that is installed elsewhere; torch has loaded what the library links to.
    sed -i.orig "s/'RelWithDebInfo'/'Release'/; s/cmake_args = \[/&'-DCMAKE_SKIP_RPATH=ON', /" setup.py
    unset "${!HOROVOD_@}" CMAKE_GENERATOR
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
    export HOROVOD_BUILD_ARCH_FLAGS=-pthread CXX=$compiler
    if [[ $operations == NCCL ]]; then
        ln -s "$nccl_library" "$work/libnccl.so" # torch's own is named libnccl.so.2 alone
        export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=shared HOROVOD_NCCL_INCLUDE=$nccl_home/include HOROVOD_NCCL_LIB=$work
        export HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home CUDACXX=$cuda_home/bin/nvcc PATH=$cuda_home/bin:$PATH
    else # ignore a CUDA or ROCm that is there all the same, but incomplete or of another version
        sed -i.orig -E 's/\((CUDA|ROCM)_HOME is not None\)/False/' cmake/Modules/FindPytorch.cmake
        sed -i.orig 's/^check_language(CUDA)//; s/^    find_package(CUDAToolkit)$//' CMakeLists.txt
    fi
    # Each compiler takes up to 2 GB.
    jobs=$(awk -v cpus="$(nproc)" '/MemAvailable/ {n = int($2 / 2e6); print n < 1 ? 1 : n < cpus ? n : cpus}' /proc/meminfo) || jobs=1
    MAKEFLAGS=-j$jobs "$python" -c 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])' "$work"
}

[[ $# -le 1 && ${1:-} != -* ]] || fail 2 "usage: scripts/install_horovod.sh [PYTHON]"
python=${1:-$root/.venv/bin/python}
[[ $# == 1 || -x $python ]] || python=python3
python=$(command -v "$python") || fail 2 "no Python at ${1:-python3}; make .venv with 'make venv' or name one that has torch"
[[ $python == /* ]] || python=$PWD/$python
cd / # since "python -" imports from the current folder first

! is_installed || exit 0
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip --version >/dev/null 2>&1 || fail 2 "$python has no pip; install it (python3-pip on Debian and Ubuntu)"

work=$(mktemp -d "${TMPDIR:-/tmp}/horovod.XXXXXXXX")
trap 'rm -rf "$work"' EXIT
cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/iais/horovod
{ mkdir -p "$cache" && touch "$cache/lock"; } 2>/dev/null || cache=$work
if command -v flock >/dev/null; then
    exec 8>"$cache/lock"
    flock --nonblock 8 || { say "waiting for another call to finish" && flock 8; }
    ! is_installed || exit 0
fi

kept=$cache/$version-torch$torch-$platform-$operations${nccl_version:+$nccl_version-cuda$cuda}-$(declare -f build | cksum | tr ' ' -)
wheels=("$kept"/*.whl)
if ((${#wheels[@]} == 0)); then
    find_compiler
    log=$(mktemp "${TMPDIR:-/tmp}/horovod-log.XXXXXXXX")
    say "building $version for torch $torch in C++$standard, with $operations ($reason); takes a few minutes, log: $log"
    set +e # since "set -e" has no effect inside a condition
    (build) >"$log" 2>&1 </dev/null
    code=$?
    set -e
    ((code == 0)) || { tail -n 15 "$log" >&2 && fail 1 "could not be fetched or built (above); the whole log is in $log"; }
    rm "$log"
    mkdir -p "$kept"
    cp "$work"/*.whl "$kept/partial"
    mv "$kept/partial" "$kept/$(basename "$work"/*.whl)" # so that no other call finds a part of it
    wheels=("$kept"/*.whl)
fi

pip=("$python" -m pip install --quiet)
# In a virtual environment the versions are ours to choose.
"$python" -c 'import sys; exit(sys.prefix == sys.base_prefix)' && export PIP_CONSTRAINT= && pip+=(--constraint "$root/constraints.txt")
if ! { "${pip[@]}" --no-deps --force-reinstall "${wheels[0]}" && "${pip[@]}" "horovod==$version"; }; then
    fail 1 "${wheels[0]} could not be installed into the environment of $python; pip says why above"
fi
if ! "$python" -c 'import sys, torch, horovod.torch as hvd, horovod.runner.launch
assert hvd.gloo_built() and (sys.argv[1] != "NCCL" or hvd.nccl_built())' "$operations"; then
    "$python" -m pip uninstall --quiet --yes horovod || true
    fail 1 "the new horovod does not load (above) and was removed; delete $kept to build it again"
fi
say "installed $version for torch $torch, with $operations ($reason)"
