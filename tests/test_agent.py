"""The agent example: what its sandbox holds, and that training goes on when it has to."""

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "agent"
NAMES = ("sandbox", "task", "train", "server", "train_async")

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def agent():
    """The files of the example, by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def folder():
    """One that a user without rights can enter: those of pytest are closed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


LOOP = "while True: pass"
SLEEP = "import time; time.sleep(60)"
FORKS = "import os\nwhile True:\n    os.fork()"
STUBBORN_FORKS = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def left_over(agent, folder):
    """Processes that still run in a folder, whoever they belong to."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == folder:
                found.append(int(entry.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("assert f(12, 3) == 15", "passed"),
        ("assert f(12, 3) == 9", "failed"),
        ("import sys; sys.exit(3)", "failed"),
        ("f = 'a' * 10**10", "failed"),
        ("open('large', 'w').write('a' * 10**7)", "failed"),
        ("import os; os.kill(os.getppid(), 9)" if os.getuid() == 0 else "1 / 0", "failed"),
        (LOOP, "stopped"),
        (SLEEP, "stopped"),
        (FORKS, "failed"),
        (STUBBORN_FORKS, "stopped"),
    ],
)
def test_limits_hold(agent, folder, code, expected):
    (folder / "solution.py").write_text("def f(a, b):\n    return a + b\n")
    (folder / "test_solution.py").write_text(f"from solution import f\n{code}\n")
    begin = time.monotonic()
    limits = agent["sandbox"].Limits(seconds=1)
    assert agent["sandbox"].run(folder, "test_solution.py", limits) == expected
    assert time.monotonic() - begin < 30  # not for ever; a busy machine is slow to fork
    assert left_over(agent, folder) == []


@pytest.mark.skipif(os.getuid() != 0, reason="rights can only be dropped where there are any")
@pytest.mark.parametrize("code", ["os.setuid(0)", "open('/etc/shadow')", "open('new.py', 'w')", "os.kill(1, 0)"])
def test_root_gives_its_rights_away(agent, folder, code):
    """RLIMIT_NPROC does not bind root, and root may do anything."""
    (folder / "with_rights.py").write_text(f"import os\nassert os.getresuid() != (0, 0, 0)\n{code}\n")
    (folder / "without.py").write_text("import os\nassert 0 not in os.getresuid() + os.getresgid()\n")
    assert agent["sandbox"].run(folder, "with_rights.py") == "failed"
    assert agent["sandbox"].run(folder, "without.py") == "passed"


@pytest.mark.skipif(os.getuid() != 0, reason="whoever keeps its rights can enter")
def test_a_folder_that_cannot_be_entered(agent, folder):
    """Where every test would fail, whatever it says."""
    (folder / "closed" / "task").mkdir(parents=True)
    (folder / "closed").chmod(0o700)
    with pytest.raises(PermissionError, match="closed, which a user without rights cannot enter"):
        agent["sandbox"].run(folder / "closed" / "task", "test.py")


@pytest.fixture
def episode(agent):
    environment = agent["task"].FixTheFile()
    environment.limits = agent["sandbox"].Limits(seconds=1)
    environment.reset(name="total", wrong="-")
    return environment


def test_an_episode(episode):
    assert episode.read("solution.py") == "def f(a, b):\n    return a - b\n"
    assert episode.check() == "failed" and episode.get_reward() == 0.0
    assert episode.edit("solution.py", "*", "+") == "not found"
    assert episode.edit("solution.py", "-", "+") == "edited"
    assert episode.check() == "passed" and episode.get_reward() == 1.0
    assert episode.edit("solution.py", "+", "//") == "edited"
    assert episode.get_reward() == 0.0


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "link", "sub/../../secret"])
def test_paths_outside_are_refused(episode, path, tmp_path):
    (tmp_path / "secret").write_text("a - b\n")
    (episode._folder / "link").symlink_to(tmp_path / "secret")
    for tool in (episode.read, lambda path: episode.edit(path, "-", "+")):
        with pytest.raises(ValueError, match="is outside the folder"):
            tool(path)
    assert (tmp_path / "secret").read_text() == "a - b\n"


def test_the_test_is_not_edited(episode):
    with pytest.raises(ValueError, match="the test is not to be edited"):
        episode.edit("test_solution.py", "==", "!=")


@pytest.mark.parametrize("operator", [LOOP, FORKS])
def test_edited_code_that_does_harm(episode, operator):
    """The edit is taken, the episode scores 0."""
    assert episode.edit("solution.py", "-", f"+ b\n{operator}\n#") == "edited"
    assert episode.get_reward() == 0.0
    assert left_over(None, episode._folder) == []


def options(agent, **changes):
    values = {"steps": 2, "updates": 2, "batch": 8, "learning_rate": 1e-3, "seed": 0, **changes}
    return type("Options", (), values)()


@pytest.fixture(scope="module")
def learned(agent):
    """A model that calls its tools."""
    model, tokenizer = agent["task"].make_model(0), agent["task"].make_tokenizer()
    agent["task"].learn_the_tools(model, tokenizer, 100, 0)
    return model, tokenizer


def test_training_goes_on(agent, learned, monkeypatch):
    """The code of every episode loops or forks without end; two steps are trained all the same, at a score of 0."""
    task = agent["task"]
    harm = iter([LOOP, FORKS] * 1000)
    reset = task.FixTheFile.reset

    def harmful_reset(self, **kwargs):
        reset(self, **kwargs)
        file = self._folder / task.FILE
        file.write_text(file.read_text() + next(harm) + "\n")

    monkeypatch.setattr(task.FixTheFile, "reset", harmful_reset)
    monkeypatch.setattr(task.FixTheFile, "limits", agent["sandbox"].Limits(seconds=1))
    monkeypatch.setattr(task, "MOST_RUNS", 0)  # only the reward runs the code: seconds, not minutes
    rewards, turns = agent["train"].train(*learned, True, options(agent))
    assert rewards == [0.0]
    assert turns.trainer.state.global_step == 2


def test_every_turn_has_its_rows(agent, learned, capsys):
    rewards, turns = agent["train"].train(*learned, True, options(agent))
    assert len(rewards) == 1
    assert (turns.rows_without_record, turns.rows > 200) == (0, True)
    assert "rows without a record: 0 of" in capsys.readouterr().out
    agent["train"].show_turns(turns, learned[1])
    printed = capsys.readouterr().out.splitlines()[2:]
    assert len(printed) == 5  # the prompt and what was said in four turns
    rows = [int(line.split()[1]) for line in printed]
    assert sum(rows) == len(turns.episode.record) == len(turns.episode.tokens) - 1
    assert all(tool in line for tool, line in zip(("<read>", "<edit>", "<check>"), printed[1:4], strict=True))
    shown = [line[line.index("[") + 1 : line.index("]")] for line in printed]
    first = turns.episode.record[0, 0].sort().values
    assert torch.equal(first, torch.tensor([int(expert) for expert in shown[0].split(",")], dtype=first.dtype))


def test_asynchronous_training(agent, monkeypatch, capsys):
    """Episodes of several turns, from a server and a rollout process of their own, each row through its experts."""
    pytest.importorskip("aiohttp", reason="TRL's rollout process needs `pip install aiohttp`")
    example = agent["train_async"]
    patched = [(example.packing, "_flash_attn"), (example.async_rollout_worker, "is_vllm_available")]
    for module, name in [*patched, (example.async_grpo_trainer, "get_peak_flops_per_device")]:
        monkeypatch.setattr(module, name, getattr(module, name))  # given back after what the example makes of it
    log = example.main(["--steps", "2", "--batch", "8", "--tool_steps", "30"])
    assert [entry["routing_replay/replayed_frac"] for entry in log] == [1.0, 1.0]
    # the server computes as training does, so at equal weights no router would choose otherwise
    assert log[0]["routing_replay/fresh/changed_router_frac"] < 0.02
    assert log[0]["ratio"] == pytest.approx(1, abs=1e-3)
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.split()[:1] in (["1"], ["2"])]) == 2
