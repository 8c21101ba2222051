"""Commands of the pages parse, with the parsers of those programs; files that they name exist; data is data."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from documents.code_blocks import PAGES, ROOT, blocks_of, read_blocks

from trl_r3.cli.command import build_parser

SHELL = {"bash", "sh", "shell", "console"}
DATA: dict[str, Callable] = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
READ_ONLY = {"text", "bibtex", "mermaid", "diff"}  # nothing to run

# Need vLLM, which is not installed where these tests run; tests/vllm_cpu starts both.
NOT_HERE = {"vllm", "trl"}
# Programs of others that say nothing about this package.
OF_OTHERS = {
    "python3",
    "git",
    "cd",
    ".",
    "source",
    "export",
    "mkdocs",
    "mypy",
    "ruff",
    "docker",
    "apt-get",
    "curl",
    "tensorboard",
    "uv",
    "nvidia-smi",
    "ray",
}

EVERY = [block for page in PAGES for block in blocks_of(page)]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as words, without settings of the environment before it."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&|;"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_file(name: str, page: str) -> None:
    """It is in the tree, or a block of the page is that file."""
    scripts = [block.code for block in blocks_of(page)] if (ROOT / page).is_file() else []
    if not (ROOT / name).exists() and not any(code.startswith(f"# {name}") for code in scripts):
        raise ValueError(f"{page} names {name}, which is neither in the tree nor a block of the page")


def check_script(words: list[str], page: str) -> None:
    """A script and the files that it is given."""
    check_file(words[0], page)
    for word in words[1:]:
        if word.startswith("examples/"):
            check_file(word, page)
    source = (ROOT / words[0]).read_text() if (ROOT / words[0]).exists() else ""
    for option in (word for word in words if word.startswith("--")):
        known = option.lstrip("-").partition("=")[0] in source or "TrlParser" in source
        if not known:
            raise ValueError(f"{page} gives {words[0]} {option}, which it does not take")


def check_command(words: list[str], page: str) -> None:
    """
    Hold a command against what it calls.

    Raises:
        `SystemExit`: If a parser refuses it.
        `ValueError`: If it names a program or a file that is not known.
    """
    program, *rest = words
    if program == "trl-r3":
        if "--help" not in rest:
            build_parser().parse_args(rest)
    elif program == "accelerate":
        args = launch_command_parser().parse_args(rest[1:])
        if args.config_file is not None:
            check_file(args.config_file, page)
        if args.module:
            assert args.training_script == "trl_r3.cli"
            build_parser().parse_args(args.training_script_args)
        else:
            check_script([args.training_script, *args.training_script_args], page)
    elif program.endswith("python") and rest[:1] == ["-m"]:
        if rest[1] == "pytest":
            check_command(rest[1:], page)
    elif program.endswith("python"):
        check_script(rest, page)
    elif program == "pytest":
        for word in rest:
            if word.startswith("tests"):
                check_file(word.partition("::")[0], page)
    elif program == "pip":
        check_install(rest, page)
    elif "/" in program:
        check_file(program, page)
    elif program not in NOT_HERE | OF_OTHERS:
        raise ValueError(
            f"{page} calls {program}, which no check knows: add one, or say that it is not of this package"
        )


def check_install(words: list[str], page: str) -> None:
    """Files of constraints exist, and so do the extras of this package."""
    for option, value in zip(words, words[1:], strict=False):
        if option in ("-c", "-r"):
            check_file(value, page)
    extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) =", extras, re.MULTILINE))
    for word in words:
        asked = re.fullmatch(r"(?:\.|trl[-_]r3)\[(.*)\].*", word)
        if asked and not set(asked[1].split(",")) <= known:
            raise ValueError(f"{page} installs {word}; the extras are {sorted(known)}")


@pytest.mark.parametrize("block", EVERY, ids=str)
def test_every_block_is_of_a_kind(block):
    assert block.language in {"python", *SHELL, *DATA, *READ_ONLY}, f"say at {block} what it is: bash, text, ..."


@pytest.mark.parametrize("block", [block for block in EVERY if block.language in SHELL], ids=str)
def test_commands_parse(block):
    found = list(commands(block.code))
    assert found
    for words in found:
        check_command(words, block.page)


@pytest.mark.parametrize("block", [block for block in EVERY if block.language in DATA], ids=str)
def test_data_parses(block):
    DATA[block.language](block.code)


@pytest.mark.parametrize(
    "line",
    [
        "trl-r3 verify MODEL --engine sglang",
        "X=1 trl-r3 plans",
        "pip install . && trl-r3 demo --smok --no",
        "accelerate launch --config_file examples/accelerate/none.yaml examples/recipes/train.py",
        "accelerate launch --config_file examples/accelerate/ddp.yaml train.py",
        "accelerate launch --config_files examples/accelerate/ddp.yaml \\\n  examples/recipes/train.py --config a",
        "python examples/none.py",
        "python examples/replay_without_trl.py MODEL --max_token 3",
        "pytest tests/none.py",
        'pip install ".[tests]"',
        "trl-r4 demo",
    ],
)
def test_a_wrong_command_is_found(line, capsys):
    with pytest.raises((SystemExit, ValueError)):
        for words in commands(line):
            check_command(words, "a page")


def test_fences_are_read():
    text = "a\n```python\nx\n\n```\n=== tab\n\n    ```bash title=y\n    z \\\n      w\n    ```\n"
    assert [(b.line, b.language, b.code) for b in read_blocks("p", text)] == [
        (2, "python", "x\n\n"),
        (8, "bash", "z \\\n  w\n"),
    ]
    with pytest.raises(ValueError, match="p:1 opens a block that nothing closes"):
        read_blocks("p", "```bash\nls\n")
