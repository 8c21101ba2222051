"""The file of a trace: safetensors with JSON metadata, written whole or not at all. Nothing in a file is trusted.

Whatever a header claims is held against the size of the file before a tensor is made of it.

Legend: B samples, N tokens and C completion tokens of all samples, R rows, F forwards, L MoE layers, E experts, K
experts per token.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..records.checks import check_rows
from ..records.record import pack
from .trace import Trace, TraceFacts

_FORMAT = {"format": "trl_r3.trace", "version": "1"}
_MAX_HEADER = 65536  # bytes; ours has some thousand
_MAX_PADDING = 4096  # tokens that a batch may be wider than its longest sample, on either side
_MAX_NUMBER = 2**31 - 1
_LOADS = ("load_live", "load_recorded")
_LOGPROBS = ("F64", "F32", "F16", "BF16")
_DTYPES = {torch.uint8: "U8", torch.int16: "I16"}
_NAME = re.compile(r"step-(\d+)-rank-(\d+)\.safetensors")


def trace_name(step: int, rank: int) -> str:
    """Name of the file of one process at one step."""
    return f"step-{step:08d}-rank-{rank:05d}.safetensors"


def find_traces(directory: Path) -> list[Path]:
    """The files in a folder that are named as traces are, by step and rank."""
    found = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda each: (int(each[0][1]), int(each[0][2])))]


def save_trace(trace: Trace, directory: Path) -> Path:
    """
    Write a trace under its name, whole or not at all.

    Args:
        trace ([`Trace`]):
            With records.
        directory (`Path`):
            A folder that exists.

    Returns:
        `Path`: The file.

    Raises:
        `OSError`: If it cannot be written. Nothing is left of it.
    """
    path = directory / trace_name(trace.facts.step, trace.facts.rank)
    names = [field.name for field in fields(Trace) if field.name != "facts"]
    tensors = {name: value.contiguous() for name in names if (value := getattr(trace, name)) is not None}
    for name in _LOADS:
        if int(tensors[name].max()) < 2**16:  # else they would be much of a short trace
            tensors[name] = tensors[name].to(torch.uint16)
    content = save(tensors, {**_FORMAT, "facts": json.dumps(asdict(trace.facts))})
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    return path


def load_trace(path: str | os.PathLike[str], *, with_records: bool = True) -> Trace:
    """
    Read a trace that a trainer wrote with `routing_replay_trace_dir`.

    Nothing in the file is run, and no more memory is taken than the file is large.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        with_records (`bool`, *optional*, defaults to `True`):
            Whether to read the records, most of the file.

    Returns:
        [`Trace`].

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is no trace, or a damaged one.

    Example:

    ```python
    >>> from trl_r3 import load_trace
    >>> trace = load_trace("traces/step-00000012-rank-00000.safetensors")
    >>> trace.facts.step, trace.records.shape
    ```
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no trace {path}. Pass a file that `routing_replay_trace_dir` holds.")
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return _Reader(file).trace(with_records)
    except (SafetensorError, OSError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a trace: {error}. Pass a file that a trainer "
            "wrote with `routing_replay_trace_dir`, copied whole."
        ) from error


def _check_header(path: Path) -> None:
    """Parsing takes many times the bytes of a header, so a large one is not even looked at."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
        raise ValueError(f"its header claims {length} bytes")


class _Reader:
    """One open file."""

    def __init__(self, file: Any):
        self.file = file
        self.facts = _facts(file.metadata() or {})
        self.names = set(file.keys())

    def trace(self, with_records: bool) -> Trace:
        """All tensors, each with the shape and dtype that the others ask for."""
        lengths, forwards = self._read("lengths", [None, 2], "I32"), self._read("forwards", [None, 3], "I32")
        _check_sizes(lengths, forwards)
        completions, total = int(lengths[:, 1].sum(dtype=torch.int64)), int(lengths.sum(dtype=torch.int64))
        layout = self.facts.layout
        num_layers, experts = len(layout.moe_layers), [len(layout.moe_layers), layout.num_experts]
        record_shape = [total - len(lengths), num_layers, layout.top_k]
        self._check("records", record_shape, (_DTYPES[layout.storage_dtype],))
        tokens = self._read("tokens", [total], "I32")
        if int(tokens.min()) < 0:
            raise ValueError("a token is negative")
        return Trace(
            facts=self.facts,
            lengths=lengths,
            forwards=forwards,
            tokens=tokens,
            masks=self._read("masks", [completions], "U8"),
            train_logprobs=self._read("train_logprobs", [completions], *_LOGPROBS),
            rollout_logprobs=self._logprobs("rollout_logprobs", completions),
            live_logprobs=self._logprobs("live_logprobs", completions),
            load_live=self._read("load_live", experts, "I32", "U16").int(),
            load_recorded=self._read("load_recorded", experts, "I32", "U16").int(),
            changed=self._read("changed", [num_layers], "I32"),
            records=self._records(lengths) if with_records else None,
            **(self._kept(completions) if with_records and "kept_ids" in self.names else {}),
        )

    def _kept(self, completions: int) -> dict[str, Tensor]:
        ids, counts = self._read("kept_ids", [None], "I32"), self._read("kept_counts", [completions], "I32")
        if int(counts.min()) < 0 or int(counts.sum(dtype=torch.int64)) != len(ids):
            raise ValueError(f"its {len(counts)} tokens keep other than {len(ids)} ids")
        if len(ids) and int(ids.min()) < 0:
            raise ValueError("a kept id is negative")
        return {"kept_ids": ids, "kept_counts": counts}

    def _logprobs(self, name: str, completions: int) -> Tensor | None:
        return self._read(name, [completions], *_LOGPROBS) if name in self.names else None

    def _read(self, name: str, shape: Sequence[int | None], *dtypes: str) -> Tensor:
        self._check(name, shape, dtypes)
        return self.file.get_tensor(name).clone()  # of its own: the file may change

    def _check(self, name: str, shape: Sequence[int | None], dtypes: Sequence[str]) -> None:
        if name not in self.names:
            raise ValueError(f"it has no `{name}`")
        seen = self.file.get_slice(name)
        given, dtype = list(seen.get_shape()), str(seen.get_dtype())
        fits = len(given) == len(shape) and all(b in (None, a) for a, b in zip(given, shape, strict=True))
        if not fits or dtype not in dtypes:
            raise ValueError(f"`{name}` is {dtype} of shape {given}, expected {' or '.join(dtypes)} of {list(shape)}")

    def _records(self, lengths: Tensor) -> Tensor:
        records, layout = self.file.get_tensor("records").clone(), self.facts.layout
        for sample, rows in enumerate(records.split((lengths.sum(1) - 1).tolist())):
            pack(rows, layout, sample=sample)  # refuses ids that the model does not have
            check_rows(rows, layout, sample=sample)
        return records


def _check_sizes(lengths: Tensor, forwards: Tensor) -> None:
    if not len(lengths) or not len(forwards) or int(lengths.min()) < 1 or int(forwards.min()) < 1:
        raise ValueError("it has a sample or a forward without tokens")
    sizes, prompt_widths, widths = forwards.long().unbind(1)
    if int(sizes.sum()) != len(lengths):
        raise ValueError(f"its forwards score {int(sizes.sum())} samples, but it has {len(lengths)}")
    prompts, completions = lengths.long().amax(0).tolist()
    for what, given, longest in (
        ("prompts", prompt_widths, prompts),
        ("completions", widths - prompt_widths, completions),
    ):
        if int(given.min()) < longest or int(given.max()) > longest + _MAX_PADDING:
            raise ValueError(
                f"a batch has {what} {int(given.min())} to {int(given.max())} wide, the longest has {longest} tokens"
            )


def _facts(metadata: dict[str, str]) -> TraceFacts:
    if {name: metadata.get(name) for name in _FORMAT} != _FORMAT:
        found = {name: str(metadata.get(name))[:40] for name in _FORMAT}
        raise ValueError(f"its metadata says {found}, expected {_FORMAT}")
    values = json.loads(metadata.get("facts", "null"))
    if isinstance(values, dict):  # a trace that says nothing of padding was scored with it
        values.setdefault("padding", "none")
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(TraceFacts)}:
        raise ValueError("its facts have other names than those of a trace")
    for field in fields(TraceFacts):
        if not _is_a(str(field.type), values[field.name]):
            raise ValueError(f"`{field.name}` is {str(values[field.name])[:40]!r}, expected {field.type}")
    facts = TraceFacts(**values)
    layers = facts.moe_layers
    if not layers or layers != sorted(set(layers)) or layers[-1] >= facts.num_decoder_layers:
        raise ValueError(f"it names {len(layers)} MoE layers of {facts.num_decoder_layers}, not in order")
    if not 1 <= facts.top_k <= facts.num_experts <= 2**15 - 1 or facts.temperature <= 0:
        raise ValueError(f"it names {facts.top_k} of {facts.num_experts} experts at temperature {facts.temperature}")
    return facts


def _is_a(kind: str, value: Any) -> bool:
    """Whether a value of the metadata is of the type that a field is annotated with."""
    if kind.endswith(" | None"):
        return value is None or _is_a(kind.removesuffix(" | None"), value)
    if kind == "list[int]":
        return isinstance(value, list) and all(_is_a("int", each) for each in value)
    if kind == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if kind == "int":
        return type(value) is int and 0 <= value <= _MAX_NUMBER
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is {"str": str, "bool": bool}[kind]
