"""The file of a trace: what it takes, what comes back, and what no file can make its reader do."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_traces import make_trace
from safetensors.torch import save

import trl_r3
from trl_r3 import load_trace
from trl_r3.traces.trace import Trace
from trl_r3.traces.trace_file import find_traces, save_trace


@pytest.mark.parametrize("experts", [16, 255, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_written_comes_back(tmp_path, experts, dtype):
    trace = make_trace(experts=experts)
    trace = Trace(**{**vars(trace), "train_logprobs": trace.train_logprobs.to(dtype), "live_logprobs": None})
    path = save_trace(trace, tmp_path)
    assert [path] == list(tmp_path.iterdir()) == find_traces(tmp_path)
    found = load_trace(path)
    assert found.facts == trace.facts
    for name, value in vars(trace).items():
        if torch.is_tensor(value):
            assert getattr(found, name).dtype == value.dtype and torch.equal(getattr(found, name), value), name
    assert found.live_logprobs is None
    without = load_trace(path, with_records=False)
    assert without.records is None and torch.equal(without.tokens, trace.tokens)
    with pytest.raises(ValueError, match=r"loaded without records\. Load it with `load_trace\(path\)`"):
        without.samples()


@pytest.mark.parametrize(("samples", "completion"), [(8, 960), (8, 4000)])
def test_size_is_that_of_the_records(tmp_path, samples, completion):
    """48 layers, top-8 of 128, most tokens sampled, live log-probabilities included."""
    trace = make_trace(samples=samples, prompt=96, completion=completion, layers=48, experts=128, top_k=8)
    records = trace.records.numel() * trace.records.element_size()
    assert save_trace(trace, tmp_path).stat().st_size <= 1.05 * records


def test_counts_of_any_size_come_back(tmp_path):
    trace = make_trace()
    for count in (2**16 - 1, 2**16, 2**31 - 1):
        trace.load_live[1, 3] = count
        assert torch.equal(load_trace(save_trace(trace, tmp_path)).load_live, trace.load_live)


def test_a_file_is_whole_or_not_there(tmp_path):
    """A disk that is full in the middle: the file of before stays, and nothing else does."""
    path = save_trace(make_trace(seed=1), tmp_path)
    before = path.read_bytes()
    path.with_suffix(".part").symlink_to("/dev/full")  # a device of Linux whose writes fail as a full disk does
    with pytest.raises(OSError, match="No space left on device"):
        save_trace(make_trace(seed=2), tmp_path)
    assert [path] == list(tmp_path.iterdir()) and path.read_bytes() == before


def test_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no trace .*nowhere\. Pass a file"):
        load_trace(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no trace"):
        load_trace(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(FileNotFoundError, match="there is no trace"):
        load_trace(tmp_path / "pipe")
    files = {
        "empty": b"",
        "text": b"hello, this is no trace at all",
        "tensors": save({"a": torch.zeros(2)}),
        "later": save({"a": torch.zeros(2)}, {"format": "trl_r3.trace", "version": "2", "facts": "{}"}),
        "bare": save({"a": torch.zeros(2)}, {"format": "trl_r3.trace", "version": "1"}),
        "deep": save({"a": torch.zeros(2)}, {"format": "trl_r3.trace", "version": "1", "facts": "[" * 30000}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as a trace: .*\. Pass a file that a trainer wrote"):
            load_trace(tmp_path / name)


class Bomb:
    """What a pickle may run."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "archive")
    Path("pickle").write_bytes(pickle.dumps(Bomb()))
    for name in ("archive", "pickle"):
        with pytest.raises(ValueError, match="cannot be read as a trace"):
            load_trace(name)
    assert not Path("exploded").exists()
    pickle.loads(Path("pickle").read_bytes())
    assert Path("exploded").exists(), "the bomb does explode where it is unpickled"


def test_a_trace_that_says_nothing_of_padding_was_scored_with_it(tmp_path):
    path = save_trace(make_trace(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(edited(content, lambda header: _without_padding(header)))
    assert load_trace(path).facts == make_trace().facts and make_trace().facts.padding == "none"


def _without_padding(header):
    facts = json.loads(header["__metadata__"]["facts"])
    del facts["padding"]
    header["__metadata__"]["facts"] = json.dumps(facts)


def edited(content, edit):
    """The file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def set_fact(name, value):
    def edit(header):
        facts = json.loads(header["__metadata__"]["facts"])
        facts[name] = value
        header["__metadata__"]["facts"] = json.dumps(facts)

    return edit


def set_entry(name, key, value):
    return lambda header: header[name].__setitem__(key, value)


HOSTILE = {
    "records of a petabyte": set_entry("records", "shape", [2**40, 2, 4]),
    "shape that overflows": set_entry("tokens", "shape", [2**62, 4]),
    "negative shape": set_entry("tokens", "shape", [-1]),
    "bytes beyond the end": set_entry("tokens", "data_offsets", [0, 2**50]),
    "another dtype": set_entry("tokens", "dtype", "F32"),
    "half a byte each": set_entry("masks", "dtype", "F4"),
    "no such dtype": set_entry("tokens", "dtype", "object"),
    "one tensor less": lambda header: header.pop("forwards"),
    "layers that are not there": set_fact("moe_layers", list(range(5000))),
    "layers out of order": set_fact("moe_layers", [2, 1]),
    "a number that is none": set_fact("num_experts", "16"),
    "experts without end": set_fact("num_experts", 2**31 - 1),
    "a huge number": set_fact("step", 10**400),
    "infinity": set_fact("temperature", float("inf")),
    "nothing": set_fact("versions", None),
    "cold": set_fact("temperature", 0.0),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(tmp_path, what):
    path = save_trace(make_trace(), tmp_path)
    path.write_bytes(edited(path.read_bytes(), lambda header: None))
    load_trace(path)  # the edit itself does no harm
    path.write_bytes(edited(path.read_bytes(), HOSTILE[what]))
    with pytest.raises(ValueError, match="cannot be read as a trace"):
        load_trace(path)


WRONG = {
    "an expert that the model lacks": ("records", 200, "expert id 200 is outside"),
    "one expert twice": ("records", 3, "expert 3 appears 4 times"),
    "a sample without tokens": ("lengths", 0, "without tokens"),
    "a sample of a terabyte": ("lengths", 2**31 - 1, "the longest has 2147483647 tokens"),
    "more samples than there are": ("forwards", 2**31 - 1, "score 2147483647 samples, but it has 3"),
    "a token below zero": ("tokens", -5, "a token is negative"),
}


@pytest.mark.parametrize("what", WRONG)
def test_numbers_that_cannot_be(tmp_path, what):
    name, value, says = WRONG[what]
    trace = make_trace()
    tensor = getattr(trace, name).clone()
    tensor[0] = value
    path = save_trace(Trace(**{**vars(trace), name: tensor}), tmp_path)
    with pytest.raises(ValueError, match=says):
        load_trace(path)


def test_a_batch_wider_than_its_samples_is_refused(tmp_path):
    """Padding is not in the file, so its width must not be believed."""
    trace = make_trace()
    wide = torch.tensor([[3, 2**30, 2**30 + 6]], dtype=torch.int32)
    path = save_trace(Trace(**{**vars(trace), "forwards": wide}), tmp_path)
    with pytest.raises(ValueError, match="prompts 1073741824 to 1073741824 wide, the longest has 4 tokens"):
        load_trace(path)


MUTATIONS = 2100
HEADROOM = 64 * 2**20  # bytes that the process may take on top of what it has


def mutated(content, random):
    """One of many ways in which a file is not what was written."""
    length = int.from_bytes(content[:8], "little")
    kind = random.randrange(6)
    spoiled = bytearray(content)
    if kind == 0:  # bits, anywhere
        for _ in range(random.randint(1, 8)):
            spoiled[random.randrange(len(spoiled))] ^= 1 << random.randrange(8)
    elif kind == 1:  # bytes of the header
        for _ in range(random.randint(1, 4)):
            spoiled[random.randrange(8 + length)] = random.randrange(256)
    elif kind == 2:  # the end is missing, or there is more
        cut = random.randrange(len(spoiled))
        spoiled = spoiled[:cut] if random.random() < 0.7 else spoiled + bytes(cut)
    elif kind == 3:  # digits of the header: shapes, offsets, numbers
        digits = [i for i in range(8, 8 + length) if spoiled[i] in b"0123456789"]
        for _ in range(random.randint(1, 3)):
            spoiled[random.choice(digits)] = random.choice(b"0123456789-e.")
    elif kind == 4:  # a run of one byte
        first = random.randrange(len(spoiled))
        last = min(len(spoiled), first + random.randint(1, 64))
        spoiled[first:last] = bytes([random.randrange(256)]) * (last - first)
    else:  # another length of the header
        spoiled[:8] = random.choice([0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(spoiled)


def read_many(folder):
    """Runs in a process of its own: prints how many files could be read and how many could not."""
    import random

    random = random.Random(0)
    path = save_trace(make_trace(), Path(folder))
    content, counts = path.read_bytes(), {True: 0, False: 0}
    load_trace(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, random))
        try:
            load_trace(path)
            counts[True] += 1
        except ValueError as error:
            assert "cannot be read as a trace" in str(error)
            counts[False] += 1
    try:
        torch.zeros(2 * HEADROOM, dtype=torch.uint8)
        print("the limit does not hold")
    except RuntimeError:
        print(json.dumps([counts[True], counts[False]]))


def test_no_file_makes_the_reader_crash_hang_or_grow(tmp_path):
    here = Path(__file__).parent
    paths = (here, here.parent, Path(trl_r3.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    code = f"import test_trace_file; test_trace_file.read_many({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    right, wrong = json.loads(ran.stdout)
    assert right + wrong == MUTATIONS and wrong > MUTATIONS / 2 and right > MUTATIONS / 50
