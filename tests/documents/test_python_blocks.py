"""
Every block of Python of the pages runs, on a tiny model and four rows of data.

Blocks of a page share their names, as in a session of its reader. A block that begins with the name of a file, such as
`# train.py`, is a script: it has to define all that it uses. Elsewhere a page may leave STAND_INS to its reader.

Legend: B batch, T tokens, E experts, K per token.
"""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from documents.code_blocks import PAGES, Block, blocks_of
from documents.small import shrink, undefined
from engines.tiny_chat import by_position, make_tokenizer, tiny_qwen3_moe
from made_traces import make_trace

import trl_r3
from trl_r3.traces.trace_file import save_trace

SCRIPT = re.compile(r"# (\w+\.py)\b")

# Blocks that cannot run here, by page and a part of their code, and why.
CANNOT_RUN: dict[tuple[str, str], str] = {}

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


def rows(*args, **kwargs):
    """Any data set that a page trains on: prompts of one message, with answers under the names that rewards use."""
    words = ["sun", "moon", "stop", "once"]
    messages = [[{"role": "user", "content": word}] for word in words]
    data = Dataset.from_dict({"prompt": messages, "answer": words, "solution": words})
    return data if "split" in kwargs else {"train": data}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """What every id of the Hub becomes."""
    folder = str(tmp_path_factory.mktemp("hub"))
    tiny_qwen3_moe().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def stand_ins(hub_folder):
    """What a page may leave to its reader, and what replaces the network."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 6), generator=generator)  # (B, T)
    mask = torch.ones_like(ids)
    prompt_ids, completion_ids = [ids[0].tolist()], [ids[1].tolist()]
    public = {name: getattr(trl_r3, name) for name in trl_r3.__all__}
    return public | {
        "hub_folder": hub_folder,
        "stand_in_load_dataset": rows,
        "stand_in_accuracy_reward": by_position,
        "torch": torch,
        "model": tiny_qwen3_moe(),
        "tokenizer": make_tokenizer(),
        "dataset": rows(split="train"),
        "reward": by_position,
        "reward_func": by_position,
        "inputs": {"input_ids": ids, "attention_mask": mask},
        "ids": ids,
        "mask": mask,
        "labels": ids,
        "logits": torch.randn(12, 16, generator=generator),  # (B * T, E)
        "routed": torch.rand(12, 16, generator=generator).topk(8).indices,  # (B * T, K)
        "turns": [],
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
    }


@pytest.fixture
def reader(hub_folder, tmp_path, monkeypatch):
    """The folder and the names of somebody who reads a page, with a run behind them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "traces").mkdir(parents=True)
    save_trace(make_trace(step=10), tmp_path / "out" / "traces")
    return stand_ins(hub_folder)


def reason_not_to_run(block: Block) -> str | None:
    """Why a block cannot run here."""
    found = [why for (page, part), why in CANNOT_RUN.items() if page == block.page and part in block.code]
    return found[0] if found else None


def run(block: Block, names: dict, supplied: dict) -> None:
    """Run a block among the names of those before it."""
    missing = undefined(block.code, set(names))
    unknown = missing if SCRIPT.match(block.code) else [name for name in missing if name not in supplied]
    if unknown:
        raise NameError(f"{block} uses {', '.join(unknown)}, which its reader does not have: define it there")
    names |= {name: supplied[name] for name in supplied if name in missing or name.startswith(("stand_in", "hub_"))}
    exec(compile(shrink(block.code), str(block), "exec"), names)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_every_block_runs(page, reader):
    names: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python" and reason_not_to_run(block) is None:
            run(block, names, reader)


def test_what_does_not_run_is_there():
    """An entry without its block is one that nobody took out."""
    for page, part in CANNOT_RUN:
        assert any(part in block.code for block in blocks_of(page)), f"no block of {page} has {part!r}"


def test_a_script_defines_what_it_uses(reader):
    code = "model.eval()\n"
    run(Block("page", 1, "python", code), {}, reader)
    with pytest.raises(NameError, match="page:1 uses model, which its reader does not have"):
        run(Block("page", 1, "python", "# train.py\n" + code), {}, reader)
    with pytest.raises(NameError, match="uses nothing_has_it"):
        run(Block("page", 1, "python", "print(nothing_has_it)\n"), {}, reader)


def test_a_wrong_setting_is_found(reader):
    """What a page says reaches the real config; only the size of the run is replaced."""
    right = 'args = R3GRPOConfig("out", use_routing_replay=True, use_vllm=True, max_steps=500)\n'
    names: dict = {}
    run(Block("page", 1, "python", right), names, reader)
    assert names["args"].use_routing_replay and names["args"].max_steps == 2 and not names["args"].use_vllm
    with pytest.raises(TypeError, match="use_router_replay"):
        run(Block("page", 1, "python", right.replace("routing", "router")), {}, reader)
    with pytest.raises(ImportError):
        run(Block("page", 1, "python", "from trl_r3 import R3PPOTrainer\n"), {}, reader)


def test_the_readme_trains_with_replay(reader):
    """The first snippet does what it is there for: every row goes through its recorded experts."""
    script = next(block for block in blocks_of("README.md") if SCRIPT.match(block.code))
    names: dict = {"__name__": "__main__"}
    run(script, names, reader)
    history = names["trainer"].state.log_history
    key = "routing_replay/replayed_frac"
    assert [entry[key] for entry in history if key in entry] == [1.0, 1.0]


def test_the_loop_trains_through_the_record_of_the_server(reader):
    """What vLLM answered for the model of the page: its experts, and no others, bring the two policies together."""
    names: dict = {"__name__": "__main__"}
    for block in blocks_of("docs/own_loop.md"):
        if block.language == "python":
            run(block, names, reader)
    assert (int(names["stats"].changed_routers), int(names["stats"].recorded_tokens)) == (1, 22)
    assert names["replayed"] < 0.1 * names["live"]
    trl_r3.disable_routing_replay(names["model"])
    wrong = names["routed_experts"].roll(-1, 1)  # each row is that of the token behind it
    with torch.no_grad(), trl_r3.RouterReplay(names["model"]) as replay, replay.replay(wrong) as shifted:
        names["model"](names["ids"], attention_mask=names["mask"], use_cache=False)
    assert int(shifted.changed_routers) > 20
