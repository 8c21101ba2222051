#!/usr/bin/env bash
# Reading the config that a DeepSeek-V4 model saved, the way Trainer does when it resumes
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: `PreTrainedConfig.from_json_file`, which `Trainer._load_from_checkpoint` calls on the checkpoint's config.json,
# reads what `save_pretrained` wrote.
# Behaviour: it refuses its own file: the base class checks `mlp_layer_types` against 'sparse' and 'dense', and
# DeepSeek-V4 names its layers 'hash_moe' and 'moe'. AutoConfig reads the same file. So no DeepSeek-V4 run can resume.
# Output seen:
#     AutoConfig: DeepseekV4Config
#     PreTrainedConfig.from_json_file: StrictDataclassClassValidationError
#     Trainer asks for it: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import inspect
import sys
import tempfile

from transformers import AutoConfig, DeepseekV4Config, PreTrainedConfig, Trainer

folder = tempfile.mkdtemp(dir=".")
DeepseekV4Config().save_pretrained(folder)
print("AutoConfig:", type(AutoConfig.from_pretrained(folder)).__name__)
try:
    found = type(PreTrainedConfig.from_json_file(f"{folder}/config.json")).__name__
except Exception as error:
    found = type(error).__name__
print("PreTrainedConfig.from_json_file:", found)
asks = "from_json_file" in inspect.getsource(Trainer._load_from_checkpoint)
print("Trainer asks for it:", asks)
sys.exit(not (found == "StrictDataclassClassValidationError" and asks))
PYTHON
