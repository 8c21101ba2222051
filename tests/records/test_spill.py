"""Records in files: the same values, mapped, and gone when they should be."""

from pathlib import Path

import file_systems
import pytest
import torch
from safetensors.torch import load_file

from trl_r3.records.spill import SpilledTensors


def records(dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, (rows, 6, 4), generator=generator).to(dtype) for rows in (700, 3, 0, 1500)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_values_shapes_and_dtypes_are_the_same(tmp_path, dtype):
    whole = records(dtype)
    whole[1] = whole[1].transpose(0, 1)[:3]  # not contiguous
    spilled = SpilledTensors(str(tmp_path / "deep" / "folder"))
    taken = [spilled.take(record) for record in whole]
    for before, after in zip(whole, taken, strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from /proc")
def test_they_are_mapped(tmp_path):
    """Not read into memory: a loaded copy must not pass."""
    spilled = SpilledTensors(str(tmp_path))
    taken = [spilled.take(record) for record in records()]

    def is_mapped(tensor):
        """Whether its first byte lies in a part of memory that is a file of the folder."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, _, last = line.split()[0].partition("-")
            if int(first, 16) <= tensor.data_ptr() < int(last, 16):
                return str(spilled.folder) in line
        return False

    assert [is_mapped(record) for record in taken] == [True, True, False, True]  # nothing of an empty one
    assert not is_mapped(taken[0].clone())


def test_files_are_safetensors(tmp_path):
    spilled = SpilledTensors(str(tmp_path))
    whole = records()
    for record in whole:
        spilled.take(record)
    found = sorted(spilled.folder.glob("*.safetensors"))
    assert len(found) == 3
    assert torch.equal(load_file(found[0])["tensor"], whole[0])


def test_files_go_and_values_stay(tmp_path):
    whole = records()
    spilled = SpilledTensors(str(tmp_path))
    taken = [spilled.take(record) for record in whole]
    assert list(tmp_path.rglob("*.safetensors"))
    spilled.remove()
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before, after) for before, after in zip(whole, taken, strict=True))
    SpilledTensors(str(tmp_path)).take(whole[0])  # and nobody holds it
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_file_system_that_keeps_what_is_mapped(tmp_path, monkeypatch):
    file_systems.keep_what_is_mapped(monkeypatch)
    whole = records()
    spilled = SpilledTensors(str(tmp_path))
    taken = [spilled.take(record) for record in whole]
    del taken[0]
    spilled.remove()
    assert len(list(tmp_path.rglob(".nfs*"))) == 2 and not list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(taken[-1], whole[-1])


def test_two_processes_share_a_folder(tmp_path):
    one, other = SpilledTensors(str(tmp_path)), SpilledTensors(str(tmp_path))
    assert one.folder != other.folder
    first, second = one.take(records()[0]), other.take(records()[3])
    one.remove()
    assert (first.shape[0], second.shape[0]) == (700, 1500)
    assert list(tmp_path.rglob("*.safetensors"))
