#!/usr/bin/env bash
# Make .venv with everything the demo and the tests need, and the extra of pyproject.toml that is named (`torch`).
# uv where it is installed, else python3 -m venv and pip.
set -eu
cd "$(dirname "$0")/.."

# On Linux without a fast BLAS the MKL wheel makes the CPU backend 50 times faster; it is 64-bit Intel and AMD only.
extras=dev${1:+,$1}
if [ "$(uname -sm)" = "Linux x86_64" ] && ! { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -q libopenblas.so; then
    extras=$extras,blas
fi

for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python3.14; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
done

rm -rf .venv
echo "setting up .venv (a minute or two, once) ..."
if command -v uv >/dev/null && uv venv --quiet ${python:+--python "$python"} .venv; then
    uv pip install --quiet --python .venv/bin/python --constraint constraints.txt ".[$extras]" || failed=1
elif [ -n "${python:-}" ] && "$python" -m venv .venv 2>/dev/null; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt ".[$extras]" || failed=1
else
    echo "error: need uv, or Python 3.10+ with venv; mend it with 'brew install uv' (macOS) or" \
         "'apt-get install python3 python3-venv' (Debian, Ubuntu), then run make again" >&2
    exit 1
fi
if [ -n "${failed:-}" ]; then
    echo "error: the packages could not be installed (see above); check the network and the Python version, then run make again" >&2
    exit 1
fi
