#!/usr/bin/env bash
# Make .venv with everything a night needs. With an argument: add an extra of pyproject.toml to it (`dev`, `torch`, `chat`, `page`).
# uv where it is installed, else python3 -m venv and pip. What would make the set-up useless is told before it begins.
set -eu
cd "$(dirname "$0")/.."

stop() { echo "error: $1" >&2; exit 1; }

case $(uname -s) in
Darwin)
    [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] || stop "this Mac has no Apple Silicon, which MLX needs"
    version=$(sw_vers -productVersion)
    [ "${version%%.*}" -ge 14 ] || stop "MLX needs macOS 14 or later, this is $version; update it in System Settings > General"
    ;;
Linux)
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2) || true
    [ -n "$glibc" ] && [ "$(printf '2.35\n%s\n' "$glibc" | sort -V | head -n1)" = 2.35 ] || stop \
        "MLX needs glibc 2.35 or later, this system has ${glibc:-another C library}; use Ubuntu 22.04, Debian 12 or later, or a container of it"
    ;;
esac
# On a Mac /usr/bin/git is there from the start, and only offers to install one
git --version >/dev/null 2>&1 || stop "git does not run; install it: xcode-select --install (macOS), or apt-get install git (Debian, Ubuntu)"
if ! [ "$(git rev-parse --show-toplevel 2>/dev/null)" -ef . ] || ! git rev-parse --quiet --verify HEAD >/dev/null; then
    echo "error: $(pwd) is not a git repository with a commit, and a night keeps what it finds as commits. Make it one, then go on:" >&2
    echo "    git init -q && git add -A && git -c user.name=me -c user.email=me@localhost commit -qm start" >&2
    exit 1
fi

for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python3.14; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
done
if [ "$(uname -s)" = Darwin ] && [ -n "${python:-}" ] && [ "$("$python" -c 'import platform; print(platform.machine())')" != arm64 ]; then
    command -v uv >/dev/null || stop "$python runs as one for Intel, and MLX needs one for Apple Silicon. If your terminal is set to Open using Rosetta (Finder, Get Info), untick that; else install Python from python.org, or uv with: brew install uv"
    python=  # uv finds another one, or fetches it
fi

echo "setting up .venv${1:+ for $1} (a minute or two, once) ..."
# An environment that works is kept: it may hold other extras, and a night may run in it. To begin anew: make clean
suits='import sys, platform; sys.exit(sys.version_info < (3, 10) or (sys.platform, platform.machine()) == ("darwin", "x86_64"))'
if ! .venv/bin/python -c "$suits" 2>/dev/null || ! { command -v uv || .venv/bin/python -m pip --version; } >/dev/null 2>&1; then
    rm -rf .venv
    trap 'rm -rf .venv' EXIT  # until it is whole: a half-made one would be kept
    if command -v uv >/dev/null && uv venv --quiet ${python:+--python "$python"} .venv; then :
    elif [ -n "${python:-}" ] && "$python" -m venv .venv 2>/dev/null; then :
    else
        stop "need uv, or Python 3.10+ with venv: 'brew install uv' (macOS) or 'apt-get install python3 python3-venv' (Debian, Ubuntu)"
    fi
fi
if command -v uv >/dev/null; then
    uv pip install --quiet --python .venv/bin/python --constraint constraints.txt ".${1:+[$1]}" || failed=1
else
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt ".${1:+[$1]}" || failed=1
fi
[ -z "${failed:-}" ] || stop "the packages could not be installed (see above); check the network and the Python version, then run make again"
trap - EXIT
# Compile to bytecode now, because trainings in a sandbox may not write here; on all cores, where pip would use one. Only the local
# model imports `transformers`, which is large
.venv/bin/python -m compileall -q -j 0 -x '/transformers/' .venv/lib >/dev/null || true
