#!/usr/bin/env bash
# Builds horovod against the torch of an interpreter and installs it there:  scripts/install_horovod.sh [PYTHON]
#
# PYTHON is .venv/bin/python if there, otherwise python3. Does nothing where a horovod built for that torch is installed.
# Wheels that were built are kept in ${XDG_CACHE_HOME:-~/.cache}/iais/horovod, one for each combination of versions.
# Needs a C++ compiler, make and Python's headers. GPUs talk through NCCL where torch is a CUDA build and nvcc of that CUDA
# and NCCL are there; otherwise horovod is built with Gloo alone, which handles tensors on the CPU.
#
# Exit code: 0 installed; 1 building or installing failed; 2 no usable Python or torch; 3 no compiler, make or Python.h.
# Environment: CXX, the compiler; HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME, folders of CUDA and NCCL.

set -euo pipefail
shopt -s nullglob
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root

readonly version=0.28.1
readonly sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0

say() { echo "horovod: $*" >&2; }

fail() { # with exit code $1
    say "${*:2}"
    exit "$1"
}

# Seven lines about the interpreter: torch's version, its CUDA, the C++ standard of its extensions, the rest of what a wheel
# depends on, the folder of Python.h, the folder of torch's own NCCL, and what the stamp of an installed horovod says. Nothing
# is imported, since that takes a second.
describe() {
    "$python" - <<'END'
import hashlib, importlib.util, pathlib, platform, re, runpy, sys, sysconfig

def folder_of(package):
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return pathlib.Path(folders[0]) if folders else None

torch, horovod = folder_of("torch"), folder_of("horovod")
if torch is None or not (torch / "version.py").is_file():
    sys.exit(4)
facts = runpy.run_path(str(torch / "version.py"))
standards = re.findall(r"-std=c\+\+(\d\d)", (torch / "utils/cpp_extension.py").read_text(encoding="utf-8"))
nccl = torch.parent / "nvidia/nccl"
stamp = "none"
if horovod is not None:
    stamp = "unknown"
    library = horovod / f"torch/mpi_lib_v2{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (horovod / "built-for").is_file() and library.is_file():
        *words, checksum = (horovod / "built-for").read_text().split()
        if checksum == hashlib.sha256(library.read_bytes()).hexdigest():
            stamp = " ".join(words)
print(facts["__version__"])
print(facts.get("cuda") or "none")
print(max(standards, default="17"))
print("-".join((sysconfig.get_config_var("SOABI"), sysconfig.get_platform(), "".join(platform.libc_ver()) or "libc")))
print(sysconfig.get_path("include"))
print(nccl if (nccl / "include/nccl.h").is_file() else "none")
print(stamp)
END
}

# Imports the installed horovod, fails unless it was built for this torch, and leaves a stamp, so that the next call need not.
verify() {
    "$python" - <<'END'
import hashlib, importlib.metadata, json, pathlib, sys
import torch, horovod, horovod.torch as hvd

folder = pathlib.Path(horovod.__file__).parent
built_for = json.loads((folder / "metadata.json").read_text())["pytorch"]
if built_for != torch.__version__:
    sys.exit(f"horovod was built for torch {built_for}, not {torch.__version__}")
if not (hvd.gloo_built() or hvd.mpi_built()):
    sys.exit("horovod was built without Gloo and MPI")
library = pathlib.Path(hvd.mpi_lib_v2.__file__)
operations = "NCCL" if hvd.nccl_built() else "Gloo"
try:
    (folder / "built-for").write_text(f"{built_for} {operations} {hashlib.sha256(library.read_bytes()).hexdigest()}\n")
    for path in importlib.metadata.files("horovod") or []:  # so that uninstalling removes the stamp, and with it the folder
        if path.name == "RECORD" and "horovod/built-for," not in path.read_text():
            with path.locate().open("a") as record:
                record.write("horovod/built-for,,\n")
except OSError:  # installed by another user
    pass
END
}

find_cuda() { # prints the folder of the CUDA toolkit
    local folder
    for folder in ${HOROVOD_CUDA_HOME:+"$HOROVOD_CUDA_HOME"} ${CUDA_HOME:+"$CUDA_HOME"} /usr/local/cuda; do
        if [[ -x $folder/bin/nvcc ]]; then
            echo "$folder"
            return
        fi
    done
    folder=$(command -v nvcc) && folder=$(readlink -f "$folder") && dirname "$(dirname "$folder")"
}

# Sets operations to NCCL or Gloo, and reason, cuda_home, nccl_include, nccl_library and nccl_version with it.
choose_operations() {
    local nvcc_version folder library
    operations=Gloo
    nccl_version=
    if [[ $torch_cuda == none ]]; then
        reason="this torch is no CUDA build"
        return
    fi
    if ! cuda_home=$(find_cuda) || ! nvcc_version=$("$cuda_home/bin/nvcc" --version 2>/dev/null | grep -Eo 'release [0-9.]+'); then
        reason="torch is built for CUDA $torch_cuda, but there is no nvcc; set HOROVOD_CUDA_HOME to use one"
        return
    fi
    nvcc_version=${nvcc_version#release }
    if [[ ${nvcc_version%%.*} != "${torch_cuda%%.*}" ]]; then
        reason="torch is built for CUDA $torch_cuda, but nvcc in $cuda_home is $nvcc_version"
        return
    fi
    # Torch's own NCCL comes first, because that is what the process has loaded when horovod is imported.
    for folder in ${HOROVOD_NCCL_HOME:+"$HOROVOD_NCCL_HOME"} "$torch_nccl" "$cuda_home" /usr; do
        [[ -f $folder/include/nccl.h ]] || continue
        for library in "$folder"/lib/libnccl.so{,.2} "$folder"/lib64/libnccl.so{,.2} "$folder"/lib/*-linux-gnu/libnccl.so{,.2}; do
            [[ -f $library ]] || continue
            nccl_include=$folder/include
            nccl_library=$library
            nccl_version=$(sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$nccl_include/nccl.h" | paste -sd. -)
            operations=NCCL
            reason="CUDA $nvcc_version in $cuda_home, NCCL $nccl_version in $folder"
            return
        done
    done
    reason="torch is built for CUDA $torch_cuda, but there is no nccl.h with a libnccl.so; set HOROVOD_NCCL_HOME to use one"
}

is_installed() { # whether a horovod for this torch is there, which has NCCL where it could
    local stamp=$1
    if [[ $stamp == unknown ]] && verify 2>/dev/null; then
        stamp=$(describe | tail -n 1)
    fi
    [[ $stamp == "$torch_version NCCL" || $stamp == "$torch_version $operations" ]]
}

check_compiler() { # sets compiler
    local candidate
    if [[ ! -f $headers/Python.h ]]; then
        fail 3 "no $headers/Python.h; install the headers of this Python (on Debian and Ubuntu the package python3-dev)"
    fi
    command -v make >/dev/null || fail 3 "no make; install it (on Debian and Ubuntu the package build-essential)"
    for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
        command -v "$candidate" >/dev/null || continue
        compiler=$(command -v "$candidate")
        if echo '#include <string>' | "$compiler" "-std=c++$standard" -x c++ -c -o /dev/null - 2>/dev/null; then
            return
        fi
    done
    if [[ -n ${compiler:-} ]]; then
        fail 3 "$compiler does not compile C++$standard, which torch $torch_version needs; install a newer one or set CXX"
    fi
    fail 3 "no C++ compiler; install one (on Debian and Ubuntu the package g++) or set CXX"
}

fetch() { # the source and the build tools into $work
    local needed=(setuptools packaging) system_cmake
    system_cmake=$(cmake --version 2>/dev/null | sed -nE 's/^cmake version 3\.([0-9]+).*/\1/p') || true
    ((${system_cmake:-0} >= 13)) || needed+=(cmake)
    # The index may want other versions of them in this environment than the build does: so a folder, and its constraints alone.
    PIP_CONSTRAINT='' "$python" -m pip install --disable-pip-version-check --no-warn-conflicts --target "$work/tools" \
        --constraint "$root/constraints.txt" "${needed[@]}" ||
        return 1
    # Pip looks into the source, so it has to check it before.
    echo "horovod==$version --hash=sha256:$sha256" >"$work/source.txt"
    PYTHONPATH=$work/tools "$python" -m pip download --disable-pip-version-check --require-hashes --no-deps --no-build-isolation \
        --no-binary horovod --dest "$work" --requirement "$work/source.txt" ||
        return 1
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
}

# Horovod's last release is of 2023. What it needs for today's torch, CUDA and Python:
patch_source() {
    "$python" - "$work/horovod-$version" "$standard" "$operations" <<'END'
import pathlib, sys

root, standard, operations = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def replace(name, old, new):
    text = (root / name).read_text(encoding="utf-8")
    if old not in text:
        sys.exit(f"{name}: no {old!r}")
    (root / name).write_text(text.replace(old, new), encoding="utf-8")

# The standard that torch compiles its own extensions with; its headers refuse older ones. And no paths of this build in the
# library: by the time it is loaded, torch has loaded all that it links to.
replace("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {standard})\nset(CMAKE_SKIP_RPATH ON)")
replace("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {standard})")
replace("horovod/common/ops/cuda/CMakeLists.txt", "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)")
# Python 3.12 has no distutils.
replace(
    "horovod/torch/CMakeLists.txt",
    "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
    "import sysconfig; print(sysconfig.get_path('include'))",
)
replace("horovod/runner/js_run.py", "from distutils.spawn import find_executable", "from shutil import which as find_executable")
# Without debug information the library is a tenth of the size and sooner built.
replace("setup.py", "'RelWithDebInfo'", "'Release'")
# What horovod needs at run time need not be there for the build.
replace("setup.py", "setup_requires=require_list if is_build_action() else []", "setup_requires=[]")
if operations == "Gloo":
    # A CUDA or ROCm folder that is there all the same is incomplete or of another version.
    replace("cmake/Modules/FindPytorch.cmake", "(CUDA_HOME is not None)", "False")
    replace("cmake/Modules/FindPytorch.cmake", "(ROCM_HOME is not None)", "False")
    replace("CMakeLists.txt", "check_language(CUDA)", "")
    replace("CMakeLists.txt", "find_package(CUDAToolkit)\n", "")
END
}

compilers() { # how many to run at a time: each takes up to 2 GB
    "$python" - <<'END'
import os, re

cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
try:
    free = int(re.search(r"MemAvailable: +(\d+) kB", open("/proc/meminfo").read())[1]) // 2_000_000
except (OSError, TypeError):
    free = cpus
print(max(1, min(cpus, free)))
END
}

compile() { # the wheel into $work/wheel
    local settings=(
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
        # Otherwise flags of this machine's processor, in a wheel that others with the same home folder install.
        HOROVOD_BUILD_ARCH_FLAGS=-pthread
        "CXX=$compiler" "PYTHONPATH=$work/tools" "PATH=$work/tools/bin:$PATH"
    )
    local ignored=(-u MAKELEVEL -u MFLAGS -u CMAKE_GENERATOR -u HOROVOD_GPU_OPERATIONS -u HOROVOD_BUILD_CUDA_CC_LIST)
    if [[ $operations == NCCL ]]; then
        mkdir "$work/nccl"
        ln -s "$nccl_library" "$work/nccl/libnccl.so"
        settings+=(
            HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=shared "HOROVOD_NCCL_INCLUDE=$nccl_include"
            "HOROVOD_NCCL_LIB=$work/nccl" "HOROVOD_CUDA_HOME=$cuda_home" "CUDA_HOME=$cuda_home" "CUDACXX=$cuda_home/bin/nvcc"
            "PATH=$cuda_home/bin:$work/tools/bin:$PATH"
        )
    fi
    cd "$work/horovod-$version"
    # A calling make leaves MAKEFLAGS behind, with a job server that is not ours.
    env "${ignored[@]}" "${settings[@]}" "MAKEFLAGS=-j$(compilers)" "$python" setup.py bdist_wheel --dist-dir "$work/wheel"
}

build() { # into the folder $1; the log goes to $2
    say "building $version for torch $torch_version in C++$standard, with $operations ($reason); a few minutes, log: $2"
    local step
    for step in fetch patch_source compile; do
        # A subshell with its own errexit, which "if" would switch off.
        set +e
        (set -e; "$step") >>"$2" 2>&1 </dev/null
        local code=$?
        set -e
        if ((code)); then
            tail -n 15 "$2" >&2
            if grep -q 'DO NOT MATCH THE HASHES' "$2"; then
                fail 1 "the source from the package index is damaged or another file: its sha256 is not $sha256"
            fi
            if [[ $step == fetch ]]; then
                fail 1 "pip could not fetch the source or the build tools (above); the whole log is in $2"
            fi
            fail 1 "building failed (above); the whole log is in $2"
        fi
    done
    # A rename cannot be seen half done, but the temporary folder may be on another disk.
    rm -rf "$1" "$1.partial"
    cp -R "$work/wheel" "$1.partial"
    mv "$1.partial" "$1"
    rm "$2"
}

install_wheel() { # $1
    local pip=("$python" -m pip install --quiet --disable-pip-version-check) inside_venv=()
    if "$python" -c 'import sys; exit(sys.prefix == sys.base_prefix)'; then
        # Whatever the image or the user pins for everything else is not ours to mix with.
        export PIP_CONSTRAINT=
        inside_venv=(--constraint "$root/constraints.txt")
    fi
    "${pip[@]}" ${inside_venv[@]+"${inside_venv[@]}"} cloudpickle psutil pyyaml packaging cffi &&
        "${pip[@]}" --no-deps --force-reinstall "$1"
}

if (($# > 1)) || [[ ${1:-} == -* ]]; then
    fail 2 "usage: scripts/install_horovod.sh [PYTHON]"
elif (($# == 1)); then
    python=$1
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
command -v "$python" >/dev/null || fail 2 "no Python at $python; make .venv with 'make venv' or name one that has torch"
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
cd / # since "python -" imports from the current folder first

facts=$(describe) || case $? in
    4) fail 2 "$python has no torch; install it first ('make venv' does so in .venv)" ;;
    *) fail 2 "$python or its torch does not work as expected; install them again" ;;
esac
{
    read -r torch_version
    read -r torch_cuda
    read -r standard
    read -r platform
    read -r headers
    read -r torch_nccl
    read -r stamp
} <<<"$facts"
choose_operations
if is_installed "$stamp"; then
    exit 0
fi
"$python" -m pip --version >/dev/null 2>&1 || fail 2 "$python has no pip; install it (on Debian and Ubuntu the package python3-pip)"

work=$(mktemp -d "${TMPDIR:-/tmp}/horovod.XXXXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/iais/horovod
if ! mkdir -p "$cache" 2>/dev/null || ! touch "$cache/lock" 2>/dev/null; then
    say "$cache cannot be written: the wheel is not kept"
    cache=$work
fi
recipe=$(declare -f fetch patch_source compile | "$python" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])')
key=$version-torch$torch_version-$platform-$operations${nccl_version:+$nccl_version-cuda$torch_cuda}-$recipe

# A second call meanwhile waits, and then finds the work done.
if command -v flock >/dev/null; then
    exec 8>"$cache/lock"
    if ! flock --nonblock 8; then
        say "waiting for another call that is at work"
        flock 8
        stamp=$(describe | tail -n 1)
        if is_installed "$stamp"; then
            exit 0
        fi
    fi
fi
wheels=("$cache/$key"/*.whl)
if ((${#wheels[@]} == 0)); then
    check_compiler
    log=$cache/$key.log
    if [[ $cache == "$work" ]]; then
        log=$(mktemp "${TMPDIR:-/tmp}/horovod-log.XXXXXXXX")
    fi
    : >"$log"
    build "$cache/$key" "$log"
    wheels=("$cache/$key"/*.whl)
fi
install_wheel "${wheels[0]}" || fail 1 "${wheels[0]} could not be installed into the environment of $python; pip says why above"
if ! verify; then
    "$python" -m pip uninstall --quiet --yes horovod || true
    fail 1 "the horovod that was built for $python does not load and was removed again; to build it anew, delete $cache/$key"
fi
if [[ -n ${log:-} ]]; then
    # Slow, as it loads torch for each of its answers: so only for a new wheel.
    checked=$("$python" -m horovod.runner.launch --check-build) || true
    [[ $checked == *'[X] PyTorch'* ]] || fail 1 "horovodrun of the new wheel does not work; to build it anew, delete $cache/$key"
    echo "$checked" >&2
fi
say "installed $version for torch $torch_version, with $operations ($reason)"
