"""Environments of `trl.experimental` whose sandbox or server is in this process: what TRL makes of them is its own.

Harbor starts containers and needs Python 3.12, an ORS server is somewhere else; both say here what tools say.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engines.script import again, big, deep, look
from trl.experimental.harbor import HarborEnv, HarborSpec
from trl.experimental.openreward import OpenRewardSpec

SAYS = {tool.__name__: tool for tool in (look, again, deep, big)}


class Sandbox:
    """What Harbor gives an environment for a task."""

    def __init__(self):
        self.commands: list[str] = []

    async def exec(self, command: str, timeout_sec: int = 0) -> Any:
        """Run a tool in place of a command."""
        self.commands.append(command)
        return SimpleNamespace(stdout=SAYS[command](), stderr="", return_code=0)

    async def stop(self, delete: bool) -> None:
        """There is nothing to stop."""


class LocalHarborEnv(HarborEnv):
    """A harness with four tools."""

    async def _start(self, task_dir: str) -> str:
        await self._stop()
        self._env = Sandbox()
        return Path(task_dir, "instruction.md").read_text()

    async def _verify(self) -> float:
        return float(len(self._env.commands))

    def look(self) -> str:
        """Look up."""
        return self._exec("look")

    def again(self) -> str:
        """Look again."""
        return self._exec("again")

    def deep(self) -> str:
        """Look down."""
        return self._exec("deep")

    def big(self) -> str:
        """Look at everything."""
        return self._exec("big")


def harbor(folder: Path, words: list[str]) -> HarborSpec:
    """A suite with a task a word."""
    for index, word in enumerate(words):
        task = folder / "tasks" / f"{index:02}"
        task.mkdir(parents=True)
        (task / "task.toml").write_text("[metadata]\n")
        (task / "instruction.md").write_text(word)
    return HarborSpec(str(folder), agent=LocalHarborEnv)


class Session:
    """One episode on an ORS server."""

    def __init__(self, word: str):
        self.word = word

    def list_tools(self) -> list[dict[str, Any]]:
        """Four tools without arguments."""
        return [{"name": name, "description": f"Tool {name}.", "input_schema": {}} for name in SAYS]

    def get_prompt(self) -> list[dict[str, str]]:
        """The word of the task."""
        return [{"type": "text", "text": self.word}]

    def call_tool(self, name: str, given: dict[str, Any]) -> Any:
        """What the tool says, as an output with a reward."""
        block = {"type": "text", "text": SAYS[name]()}
        return SimpleNamespace(blocks=[block], reward=float(len(name)), metadata=None, finished=False)


class Server(Session):
    """An environment of the SDK, as it is when the server has answered."""

    def __init__(self, words: list[str]):
        self.words, self.open = words, 0

    def num_tasks(self, split: str) -> int:
        """One a word."""
        return len(self.words)

    def list_tasks(self, split: str) -> list[dict[str, str]]:
        """One a word."""
        return [{"word": word} for word in self.words]

    @contextmanager
    def session(self, split: str, index: int, secrets: Any):
        """An episode of a task."""
        self.open += 1
        try:
            yield Session(self.words[index])
        finally:
            self.open -= 1


def openreward(folder: Path, words: list[str]) -> OpenRewardSpec:
    """An environment with a task a word."""
    spec = OpenRewardSpec("http://localhost:1")
    vars(spec).update(_sdk_client=object(), _sdk_env=Server(words))  # which are looked up once
    return spec
