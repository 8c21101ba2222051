"""What servers of vLLM and SGLang answer, as arrays of expert ids.

Legend: P prompt tokens, C completion tokens, R = P + C - 1 rows (the last token is sampled, never fed), D decoder
layers, K experts per token. Dense layers have a slot too, with any content. Only the container is checked here, not
the ids.
"""

from __future__ import annotations

import io
import math
from typing import NoReturn

import numpy as np
import pybase64
from numpy.lib import format as npy
from numpy.typing import NDArray

from .vllm_versions import VLLM_FLAG

_DTYPES = ("|u1", "<u2", "<i2", "<i4", "<i8")


def decode_vllm_http(payload: str | None) -> NDArray[np.integer]:
    """
    Decode `choices[i].routed_experts` of a vLLM server: base64 of a `.npy` file.

    NumPy reads the header, whose shape is held against the bytes present before any array exists, so a payload costs
    at most twice its size in memory. Nothing is unpickled.

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
    shape, fortran_order, dtype, start = _read_npy_header(data)
    if dtype.str not in _DTYPES:
        _refuse_npy(f"its dtype is {dtype.str!r}, expected one of {' '.join(_DTYPES)}")
    if len(shape) != 3 or min(shape) < 1:
        _refuse_npy(f"its shape is {shape}")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        _refuse_npy(f"its header promises shape {shape} of {dtype}, {expected} bytes, but {len(data) - start} follow")
    ids = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    return np.array(ids, order="C")


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


def _read_npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether the order is Fortran's, dtype, and where the array starts."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0(file) if version == (1, 0) else None
    except Exception as error:  # NumPy lets through what its parsers raise, a TokenError of `tokenize` for one
        _refuse_npy(f"its header cannot be read: {type(error).__name__}: {str(error)[:80]}")
    if header is None:
        _refuse_npy(f"its version is {version}, expected (1, 0)")
    return *header, file.tell()


def _refuse_npy(fact: str) -> NoReturn:
    raise ValueError(
        f"The vLLM payload is no .npy file of expert ids: {fact}. Expected 3 dimensions of at least 1, rows (prompt + "
        f"completion - 1), decoder layers, experts per token, and integers. Use vLLM 0.22 to 0.33, and pass "
        f"`choices[i].routed_experts` as it came, whole."
    )
