"""
Makes Python of a page small: what the reader sees is left alone, what runs fits a CPU and needs no network.

Ids of the Hub become a folder with a tiny random model, data sets become four rows, and the settings of a run are
replaced by those of a few seconds.
"""

from __future__ import annotations

import ast
import builtins
import re

HUB_ID = re.compile(r"[A-Za-z][\w-]*/[\w.-]*\d[\w.-]*")  # an owner, and a name with a size in it
CONFIGS = re.compile(r"R3\w+Config|(GRPO|SFT|DPO|RLOO)Config|TrainingArguments")

# What a config gets whatever the page says. The rest of it stays.
ANY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
ANY_ROLLOUT = {"num_generations": 2, "max_completion_length": 8}
# what is not set follows from the machine's memory
BATCHING = {"transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256}}
LEFT_OUT = re.compile(r"use_vllm|vllm_\w+|steps_per_generation|generation_batch_size|num_train_epochs")

# Imported for real, then replaced: the first two need a network, the last one a package that reads mathematics.
REPLACED = {"load_dataset", "accuracy_reward"}


class _Small(ast.NodeTransformer):
    def visit_Constant(self, node):
        if isinstance(node.value, str) and HUB_ID.fullmatch(node.value):
            return ast.copy_location(ast.Name("hub_folder", ast.Load()), node)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if CONFIGS.fullmatch(name):
            rollout = ANY_ROLLOUT if re.search("GRPO|GMPO|RLOO", name) else {}
            batches = any(each.arg == "use_transformers_continuous_batching" for each in node.keywords)
            forced = ANY_RUN | rollout | (BATCHING if batches else {})
            kept = [each for each in node.keywords if not (each.arg in forced or LEFT_OUT.fullmatch(each.arg or ""))]
            node.keywords = kept + [
                ast.keyword(key, ast.parse(repr(value), mode="eval").body) for key, value in forced.items()
            ]
        return node

    def visit_ImportFrom(self, node):
        replaced = [each.asname or each.name for each in node.names if each.name in REPLACED]
        lines = [f"{name} = stand_in_{name}" for name in replaced]
        return [node, *ast.parse("\n".join(lines)).body]


def shrink(code: str) -> ast.Module:
    """The code of a block as it runs here."""
    return ast.fix_missing_locations(_Small().visit(ast.parse(code)))


def undefined(code: str, known: set[str]) -> list[str]:
    """Names that code uses, and that neither it nor `known` nor Python defines."""
    nodes = list(ast.walk(ast.parse(code)))
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(each.asname or each.name).partition(".")[0] for each in node.names}
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(used - defined - known - set(dir(builtins)))
