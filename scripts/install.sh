#!/bin/sh
# Makes the environment and installs Fireflyer into it: `install.sh core` what running needs, `install.sh dev` what
# `make test` and `make proof` need too. Called by the Makefile, with PYTHON, VENV and TORCH set.
# An installed torch is never replaced: which build fits a machine (CPU, CUDA, ROCm) is its owner's choice.
set -eu

what=${1:-core}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
torch=${TORCH:-torch}

say() { printf 'fireflyer: %s\n' "$*" >&2; }
stop() { say "$*"; exit 1; }

command -v "$python" >/dev/null 2>&1 ||
    stop "no '$python' here: install Python 3.10 or newer, or name one with PYTHON=/path/to/python3"

apt_install() {
    # As root, on Debian and its children: the named packages, quietly. The log is shown where that fails.
    log=$(mktemp)
    if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } \
        >"$log" 2>&1; then
        rm -f "$log"
        return 0
    fi
    cat "$log" >&2
    rm -f "$log"
    return 1
}

need_venv_module() {
    # Debian and its children split ensurepip off into pythonX.Y-venv; without it `-m venv` leaves a broken folder.
    "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    package=python$version-venv
    command -v apt-get >/dev/null 2>&1 ||
        stop "this Python has no venv module (ensurepip is missing): install it with your system's package manager"
    if [ "$(id -u)" -ne 0 ]; then
        say "this Python cannot make environments: $package is missing. Type this line, then make again:"
        as_root="apt-get update && apt-get install $package"
        if command -v sudo >/dev/null 2>&1; then as_root="sudo sh -c '$as_root'"; else as_root="su -c '$as_root'"; fi
        printf '\n    %s\n\n' "$as_root" >&2
        exit 1
    fi
    say "installing $package (this Python cannot make environments without it)"
    apt_install "$package" || stop "could not install $package; mend what apt-get says above, then make again"
}

want_compiler() {
    # The native kernels are compiled as Fireflyer is installed; without them all works, quantised models slower.
    for name in cc gcc clang; do
        if command -v "$name" >/dev/null 2>&1; then return 0; fi
    done
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing for the native kernels: gcc"
        apt_install gcc libc6-dev || say "could not install gcc; going on without the native kernels"
    else
        say "no C compiler here: going on without the native kernels. On Debian: apt-get install gcc libc6-dev"
    fi
}

want_test_programs() {
    # The page is tested in a real browser, the fleet on a real Slurm. Without them those tests say so and are skipped.
    missing=
    command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing=chromium
    command -v slurmctld >/dev/null 2>&1 || missing="$missing slurmctld slurmd slurm-client munge"
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing for the tests: $missing"
        # shellcheck disable=SC2086 # a list of packages
        apt_install $missing || stop "could not install $missing; mend what apt-get says above, then make again"
    else
        say "not here: $missing; the tests that need it are skipped. On Debian: apt-get install $missing"
    fi
}

made="$venv/.fireflyer-made" # only an environment made here may be made again
if ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
    2.* | 3.?) stop "Python $version is too old: 3.10 or newer is needed; name one with PYTHON=/path/to/python3" ;;
    esac
    if [ -e "$venv" ] && [ ! -e "$made" ]; then
        stop "VENV=$venv exists and is no Python environment that runs: remove it, or name another folder"
    fi
    need_venv_module
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    touch "$made"
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$venv/bin/python" -m ensurepip >/dev/null || stop "VENV=$venv has no pip, and ensurepip cannot bring it: install pip there"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
torch_version() {
    "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

if ! torch_version >/dev/null; then
    say "installing $torch (once; some minutes)"
    pip install -qq "$torch"
fi

constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
echo "torch==$(torch_version)" >"$constraint"
say "installing Fireflyer ($what) beside torch $(torch_version)"
case $what in
core) pip install -qq --constraint "$constraint" --editable . ;;
dev)
    want_compiler
    pip install -qq --constraint "$constraint" --editable '.[dev]'
    # Its sample data are the A-share panel; what it requires is heavy, and nothing here imports it.
    pip install -qq --no-deps jqfactor-analyzer==1.1.0
    want_test_programs
    ;;
*) stop "install.sh knows 'core' and 'dev', not '$what'" ;;
esac

touch "$venv/.fireflyer-core"
[ "$what" = core ] || touch "$venv/.fireflyer-dev"
