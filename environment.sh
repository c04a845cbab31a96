#!/bin/sh
# Makes virtual environments with the exact tested versions of packages.
#
#   environment.sh find VERSION...            prints the first Python that works
#   environment.sh make DIRECTORY VERSION...  makes the environment with it
#   environment.sh stale DIRECTORY            prints FORCE if that does not run,
#                                             or has another Python than PYTHON
#
# PYTHON in the environment names a Python to take whatever VERSION says.
set -eu

# "3.11" of a Python that works and can make environments, else nothing.
version() {
    "$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null || true
}

# An existing command may not work: pyenv has a shim for every version that it
# ever installed.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if [ -z "$(version "$PYTHON")" ]; then
            echo "error: Expected a Python that works and has the modules venv" \
                "and ensurepip, received PYTHON=$PYTHON; name another." >&2
            return 1
        fi
        echo "$PYTHON"
        return
    fi
    pyenv=$(pyenv root 2>/dev/null || true)
    for wanted in "$@"; do
        for python in "python$wanted" python3 \
            "${pyenv:-/nowhere}/versions/$wanted".*[0-9]/bin/python3; do
            if [ "$(version "$python")" = "$wanted" ]; then
                echo "$python"
                return
            fi
        done
    done
    echo "error: Expected one of Python $* with the modules venv and ensurepip," \
        "found none that works; install one, or name it: PYTHON=/path/to/it." >&2
    return 1
}

make_environment() {
    directory=$1
    shift
    python=$(find_python "$@")
    wanted=$(version "$python")
    case $wanted in
    3.9 | 3.10) constraints= ;; # the tested versions are for newer ones
    3.11) constraints='--constraint constraints.txt' ;;
    3.12 | 3.13) constraints='--constraint constraints-tf221.txt' ;;
    *)
        echo "error: Expected Python 3.9 to 3.13, received $wanted ($python);" \
            "name another: PYTHON=/path/to/it." >&2
        return 1
        ;;
    esac
    if [ -e "$directory" ]; then
        has=$(version "$directory/bin/python")
        if [ "$has" != "$wanted" ]; then
            echo "$directory is for Python ${has:-(none that runs)}:" \
                "making it again for Python $wanted"
            rm -rf "$directory"
        fi
    fi
    echo "installing packages for Python $wanted into $directory" \
        "(2 GB, a few minutes)"
    "$python" -m venv "$directory"
    # Errors alone: its warnings and hints are about pip itself.
    # shellcheck disable=SC2086
    "$directory/bin/python" -m pip install -qq --no-cache-dir \
        --disable-pip-version-check $constraints --editable '.[dev]'
    touch "$directory/ready"
}

stale() {
    [ -e "$1" ] || return 0
    has=$(version "$1/bin/python")
    if [ -z "$has" ] || { [ -n "${PYTHON:-}" ] &&
        [ "$(version "$PYTHON")" != "$has" ]; }; then
        echo FORCE
    fi
}

case ${1:-} in
find) shift && find_python "$@" ;;
make) shift && make_environment "$@" ;;
stale) stale "$2" ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
