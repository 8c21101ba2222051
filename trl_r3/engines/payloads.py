"""What vLLM and SGLang return, as arrays of expert ids.

Legend: P prompt tokens, C completion tokens, R = P + C - 1 rows (the last token is sampled, never fed), D decoder
layers, K experts per token. Dense layers have a slot too, with any content. Only the container is checked here, not
the ids.
"""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn, Protocol

import numpy as np
import pybase64
from numpy.typing import NDArray

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_PREFIX = len(_NPY_MAGIC) + 2  # the length of the header follows, as a little-endian uint16
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (False|True), 'shape': \(([-0-9, ]{0,80})\), \}[ ]*\n"
)
_NPY_DTYPES = {b"|u1": "u1", b"<u2": "<u2", b"<i2": "<i2", b"<i4": "<i4", b"<i8": "<i8"}

VLLM_FLAG = (
    "Pass `enable_return_routed_experts=True` to `LLM`, or start the server with `--enable-return-routed-experts`. "
    "From vLLM 0.31 on it also needs prefix caching, and VLLM_USE_V2_MODEL_RUNNER=1 in the environment where it falls "
    "back to the first model runner."
)


class HasRoutedExperts(Protocol):
    """The part of vLLM's `CompletionOutput` that is read here."""

    routed_experts: NDArray[Any] | None


def decode_vllm_http(payload: str | None) -> NDArray[np.integer]:
    """
    Decode `choices[i].routed_experts` of a vLLM server: base64 of a `.npy` file.

    The header is parsed without evaluating it, and its shape is held against the bytes present before any array
    exists, so a payload costs at most twice its size in memory. Nothing is unpickled.

    Args:
        payload (`str`, *optional*):
            The field of the response. `None` is what a server answers that does not capture routes.

    Returns:
        `numpy.ndarray` of shape `(R, D, K)` and dtype `uint8`, `uint16`, `int16`, `int32` or `int64`: C-contiguous,
        writable, owning its memory.

    Raises:
        `ValueError`: If the payload is `None`, is no base64, or is not exactly one such array.
    """
    if payload is None:
        raise ValueError(f"The choice has no `routed_experts`: the vLLM server does not capture them. {VLLM_FLAG}")
    data = _base64_bytes(payload, "vLLM")
    dtype, fortran_order, shape, start = _parse_npy_header(data)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        _refuse_npy(f"its header promises shape {shape} of {dtype}, {expected} bytes, but {len(data) - start} follow")
    ids = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    return np.array(ids, order="C")


def decode_vllm_output(completion_output: HasRoutedExperts) -> NDArray[np.integer]:
    """
    Take the ids from a `CompletionOutput` of vLLM's `LLM.generate`.

    Args:
        completion_output (`vllm.CompletionOutput`):
            A finished completion.

    Returns:
        `numpy.ndarray` of shape `(R, D, K)` and dtype `uint8` (E <= 256) or `uint16`: the engine's own array.

    Raises:
        `ValueError`: If there are no ids, or they have the layout of vLLM before 0.22.
    """
    ids = completion_output.routed_experts
    if ids is None:
        raise ValueError(
            f"`CompletionOutput.routed_experts` is None: the engine does not capture routes, or the request was "
            f"aborted. {VLLM_FLAG}"
        )
    if not isinstance(ids, np.ndarray):
        raise ValueError(
            f"`CompletionOutput.routed_experts` is a {type(ids).__name__}, expected a numpy.ndarray. Use vLLM 0.22 to "
            f"0.33."
        )
    if ids.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"`CompletionOutput.routed_experts` has dtype {ids.dtype}, expected uint8 or uint16. vLLM before 0.22 "
            f"returns int16, without the prompt's rows, with one slot per MoE layer, and -1 where the prefix cache "
            f"hit. Upgrade to vLLM 0.22 or later."
        )
    if ids.ndim != 3 or 0 in ids.shape:
        raise ValueError(
            f"`CompletionOutput.routed_experts` has shape {ids.shape}, expected 3 dimensions of at least 1: rows "
            f"(prompt + completion - 1), decoder layers, experts per token. Use vLLM 0.22 to 0.33."
        )
    return ids


def decode_sglang(payload: str | None, num_rows: int, num_decoder_layers: int, top_k: int) -> NDArray[np.integer]:
    """
    Decode `meta_info["routed_experts"]` of SGLang: base64 of little-endian `int32` without a header.

    Args:
        payload (`str`, *optional*):
            The field of `meta_info`.
        num_rows (`int`):
            Rows R = P + C - 1 of the sample. A request with `routed_experts_start_len` has that many fewer.
        num_decoder_layers (`int`):
            Decoder layers D of the model, dense ones included.
        top_k (`int`):
            Experts K per token.

    Returns:
        `numpy.ndarray` of shape `(num_rows, num_decoder_layers, top_k)` and dtype `int32`: C-contiguous, writable,
        owning its memory.

    Raises:
        `ValueError`: If the payload is `None`, is no base64, or does not hold exactly that many ids.
    """
    shape = (num_rows, num_decoder_layers, top_k)
    if min(shape) < 1:
        raise ValueError(f"The expected shape (rows, decoder layers, experts) is {shape}: each must be at least 1.")
    if payload is None:
        raise ValueError(
            "`meta_info` has no `routed_experts`: start SGLang with `--enable-return-routed-experts` and send "
            "`return_routed_experts=True` with the request."
        )
    data = _base64_bytes(payload, "SGLang")
    expected = 4 * math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"The SGLang payload has {len(data)} bytes, expected {expected}: {num_rows} rows x {num_decoder_layers} "
            f"decoder layers x {top_k} experts x 4 bytes. Rows are prompt + completion - 1 tokens of this sample; do "
            f"not set `routed_experts_start_len`, and count dense layers among the decoder layers."
        )
    return np.frombuffer(data, "<i4").reshape(shape).copy()


def _base64_bytes(payload: str, engine: str) -> bytes:
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ValueError(
            f"The {engine} payload of {len(payload)} characters is no base64 ({error}). Pass the field of the "
            f"response as it came, whole."
        ) from error


def _parse_npy_header(data: bytes) -> tuple[np.dtype[np.integer], bool, tuple[int, int, int], int]:
    """Returns dtype, whether the order is Fortran's, shape `(R, D, K)`, and where the array starts."""
    if not data.startswith(_NPY_MAGIC):
        _refuse_npy(f"it starts with {data[:8]!r}, expected {_NPY_MAGIC!r}")
    start = _NPY_PREFIX + int.from_bytes(data[len(_NPY_MAGIC) : _NPY_PREFIX], "little")
    if len(data) < max(start, _NPY_PREFIX):
        _refuse_npy(f"its header ends at byte {start}, but it has {len(data)} bytes")
    match = _NPY_HEADER.fullmatch(data, _NPY_PREFIX, start)
    if match is None:
        _refuse_npy(f"its header of {start - _NPY_PREFIX} bytes is not that of a plain array: {data[10:90]!r}")
    descr, order, dimensions = match.groups()
    if descr not in _NPY_DTYPES:
        _refuse_npy(f"its dtype is {descr.decode('latin1')!r}, expected one of |u1 <u2 <i2 <i4 <i8")
    shape = _parse_shape(dimensions)
    return np.dtype(_NPY_DTYPES[descr]), order == b"True", shape, start


def _parse_shape(dimensions: bytes) -> tuple[int, int, int]:
    try:
        shape = tuple(int(size) for size in dimensions.removesuffix(b",").split(b","))
    except ValueError:
        _refuse_npy(f"its shape is ({dimensions.decode('ascii')})")
    if len(shape) != 3 or min(shape) < 1:
        _refuse_npy(f"its shape is {shape}, which are {len(shape)} dimensions and {min(shape)} in the smallest")
    return shape[0], shape[1], shape[2]


def _refuse_npy(fact: str) -> NoReturn:
    raise ValueError(
        f"The vLLM payload is no .npy file of expert ids: {fact}. Expected 3 dimensions of at least 1, rows (prompt + "
        f"completion - 1), decoder layers, experts per token, and integers. Use vLLM 0.22 to 0.33, and pass "
        f"`choices[i].routed_experts` as it came, whole."
    )
