"""
The task: a file with a wrong operator, a test that fails, and three tools to read the file, edit it and run the test.

The words of the model, its chat template, and conversations that teach it to call tools but not what to write.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from sandbox import Limits, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

FILE, TEST = "solution.py", "test_solution.py"
# What the function of a name returns of 12 and 3.
NAMES = {"total": ("+", 15), "difference": ("-", 9), "product": ("*", 36), "quotient": ("//", 4)}
OPERATORS = [operator for operator, _ in NAMES.values()]
SOURCE = "def f(a, b):\n    return a {} b\n"
MOST_RUNS = 3  # of the test in an episode; then it has failed


class FixTheFile:
    """An environment of TRL: `reset` begins an episode, its other public methods are the tools of the model."""

    limits = Limits()

    def __init__(self):
        self._home = tempfile.TemporaryDirectory()
        self._folder = Path(self._home.name)
        self._runs = 0

    def reset(self, name: str, wrong: str, **kwargs: Any) -> None:
        """Write the file with a wrong operator, and its test."""
        expected = NAMES[name][1]
        (self._folder / FILE).write_text(SOURCE.format(wrong))
        (self._folder / TEST).write_text(f"from solution import f\n\nassert f(12, 3) == {expected}\n")
        self._runs, self._result = 0, None

    def read(self, path: str) -> str:
        """
        Read a file.

        Args:
            path: Its name.
        """
        return self._inside(path).read_text()

    def edit(self, path: str, old: str, new: str) -> str:
        """
        Replace a word of a file.

        Args:
            path: Its name.
            old: The word that is there.
            new: The word to put in its place.
        """
        file = self._inside(path)
        if file.name == TEST:
            raise ValueError("the test is not to be edited")
        words = file.read_text().split(" ")
        if old not in words:
            return "not found"
        file.write_text(" ".join(new if word == old else word for word in words))
        self._result = None
        return "edited"

    def check(self) -> str:
        """Run the test."""
        if self._runs == MOST_RUNS:
            return "failed"
        self._runs += 1
        self._result = run(self._folder, TEST, self.limits)
        return self._result

    def get_reward(self) -> float:
        """1 if the test passes at the end, else 0."""
        return float((self._result or run(self._folder, TEST, self.limits)) == "passed")

    def _inside(self, path: str) -> Path:
        file = (self._folder / path).resolve()
        if not file.is_relative_to(self._folder.resolve()):
            raise ValueError(f"{path} is outside the folder of the task")
        if not file.is_file():
            raise ValueError(f"there is no file {path}")
        return file


_ROLES = ["<user>", "<assistant>", "<tool>"]
_CALLS = ["<read>", "<edit>", "<check>", f"path={FILE};", f"path={TEST};", "path=../secret;"]
_WORDS = ["fix", *NAMES, *OPERATORS, "def", "f(a,", "b):", "return", "a", "b", "edited", "not", "found", "done"]
_RESULTS = ["passed", "failed", "stopped"]
VOCAB = ["<pad>", "<eos>", "<unk>", *_ROLES, *_CALLS, *_WORDS, *_RESULTS]
VOCAB += [f"{side}={operator};" for side in ("old", "new") for operator in OPERATORS]

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<{{ message['role'] }}> {{ message['content'] }} {% for call in message['tool_calls'] or [] -%}
<{{ call['function']['name'] }}> {% for key, value in call['function']['arguments'].items() -%}
{{ key }}={{ value }}; {% endfor -%}{% endfor -%}
<eos> {% endfor -%}
{%- if add_generation_prompt -%}<assistant> {% endif -%}"""

_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<(?P<name>read|edit|check)>",
            "close_pattern": r"<eos>\s*|$",
            "repeats": True,
            "content": "kv-lines",
            "content_args": {"line_sep": ";", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<eos>\s*|$", "content": "text"},
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with a template that calls tools."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.response_template = _RESPONSE_TEMPLATE
    return tokenizer


def make_model(seed: int) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE: three layers, 4 of 16 experts, 0.4 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3MoeForCausalLM(config)


def problems() -> list[dict[str, Any]]:
    """Every name with every operator that is wrong for it."""
    return [
        {"prompt": [{"role": "user", "content": f"fix {name}"}], "name": name, "wrong": wrong}
        for name, (right, _) in NAMES.items()
        for wrong in OPERATORS
        if wrong != right
    ]


def demonstration(draw: random.Random) -> list[tuple[str, bool]]:
    """
    One episode in words, and whether the model says them: an agent that knows its tools and guesses the operator.
    """
    problem = draw.choice(problems())
    right, wrong = NAMES[problem["name"]][0], problem["wrong"]
    new = draw.choice(OPERATORS)
    return [
        (f"<user> fix {problem['name']} <eos> <assistant>", False),
        (f"<read> path={FILE}; <eos>", True),
        (f"<tool> {SOURCE.format(wrong)} <eos> <assistant>", False),
        (f"<edit> path={FILE}; old={wrong}; new={new}; <eos>", True),
        ("<tool> edited <eos> <assistant>", False),
        ("<check> <eos>", True),
        (f"<tool> {'passed' if new == right else 'failed'} <eos> <assistant>", False),
        ("done <eos>", True),
    ]


def learn_the_tools(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> float:
    """Supervised steps on demonstrations; returns the last loss."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = [demonstration(draw) for _ in range(16)]
        pieces = [[(tokenizer(words)["input_ids"], said) for words, said in episode] for episode in batch]
        rows = [[token for ids, _ in episode for token in ids] for episode in pieces]
        labels = [[token if said else -100 for ids, said in episode for token in ids] for episode in pieces]
        width = max(map(len, rows))
        inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        loss = model(input_ids=inputs, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
