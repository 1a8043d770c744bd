#!/bin/sh
# All of mpillm that runs on a GPU, on the machine that this is: facts, tests, losses, speed; then one page of them.
#   sh benchmarks/gpu.sh [--quick] [--json FILE]
# --quick   within 3 minutes instead of 8: fewer tests, and the speed of GPT-2 alone
# --json    the figures as JSON in FILE, too
# It needs no network and installs nothing. It takes the python3 (or $PYTHON) with torch that is there, builds the compiled
# module in a temporary folder, and names what is missing with what is left out for it. Without a GPU it says so in one
# line, with exit code 0. A step that fails or outlasts its limit is named, the others run, and the exit code is 1.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/gpu
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is not Python 3.11 or newer; name another: PYTHON=python3.12 sh benchmarks/gpu.sh" >&2
    exit 1
fi
exec "$python" -B "$folder/steps.py" "$@"
