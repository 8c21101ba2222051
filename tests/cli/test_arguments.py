"""Arguments are judged before what takes seconds to import is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import trl_r3
from trl_r3.cli import command as cli

NO_ARGUMENT = "nothing"  # stands for a path at which there is nothing
BAD = {
    "no folder of a model": (["check", "./" + NO_ARGUMENT], "there is no such folder"),
    "no folder to verify": (["verify", "/" + NO_ARGUMENT], "there is no such folder"),
    "no folder to plan": (["plan", "--model", "../" + NO_ARGUMENT, "--prompts", "1"], "there is no such folder"),
    "no strategy": (["plan", "--model", "some/model", "--prompts", "1", "--strategy", "zero4"], "`--strategy` is"),
    "no url": (["verify", "some/model", "--engine", "server"], "belong together"),
    "no server": (["verify", "some/model", "--url", "http://localhost"], "belong together"),
    "no trace": (["verify", "some/model", "--trace", NO_ARGUMENT], f"there is no trace {NO_ARGUMENT}"),
    "a trace of no engine": (["verify", "some/model", "--trace", ".", "--engine", "vllm"], "lets no engine sample"),
    "a trace of one dtype": (["verify", "some/model", "--trace", ".", "--dtype", "bfloat16"], "that it was made in"),
    "no run": (["report", NO_ARGUMENT], f"{NO_ARGUMENT} is no folder"),
    "three runs": (["report", ".", ".", "."], "3 folders, expected one run, or two"),
}
HEAVY = ("torch", "numpy", "transformers", "trl", "matplotlib", "rich")
SCRIPT = f"""
import contextlib, io, json, sys
from trl_r3.cli.command import main
told = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        told.append([main(arguments), stream.getvalue()])
print(json.dumps([told, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Status and words of each, and what was imported for them all."""
    arguments = json.dumps([arguments for arguments, _ in BAD.values()])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        cwd=tmp_path_factory.mktemp("empty"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, imported = json.loads(run.stdout)
    return dict(zip(BAD, told, strict=True)), imported


@pytest.mark.parametrize("what", BAD)
def test_it_is_one_sentence(told, what):
    status, words = told[0][what]
    assert status == 2 and BAD[what][1] in words and words.count("\n") == 1


def test_nothing_heavy_was_imported(told):
    assert told[1] == []


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"trl-r3 {trl_r3.__version__}\n"
