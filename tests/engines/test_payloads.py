"""The decoders of what servers return: recorded, synthetic and damaged payloads."""

from __future__ import annotations

import base64
import io
import pickle
import struct
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_r3 import decode_sglang, decode_vllm_http, decode_vllm_output

# A choice of vLLM 0.30: L=4 with layer 1 dense, E=8, K=2, prompt 10 to 14, completion 510 365 140 332 70 48.
RECORDED = (
    "k05VTVBZAQB2AHsnZGVzY3InOiAnfHUxJywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDEwLCA0LCAyKSwgfSAgICAgICAgICAg"
    "ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAoBBgAAAwIEBgEFAAACAAQGAQMAAAECBAABBQAAAQIEAAEAAAACBAAE"
    "AQAAAAIBBAAEAQAAAwcABAUEAAACAwAHBgAAAAEHAAQABQAAAgMEBw=="
)
HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4, 2), }"


def npy(ids: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, ids, allow_pickle=False)
        return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def npy_with_header(header: bytes, body: bytes, version: bytes = b"\x01\x00") -> str:
    return text(b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body)


@contextmanager
def peak_below(limit: int):
    """Fail if the block has more than `limit` bytes of memory allocated at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_recorded_payload():
    ids = decode_vllm_http(RECORDED)
    assert ids.shape == (10, 4, 2) and ids.dtype == np.uint8
    np.testing.assert_array_equal(ids[0], [[1, 6], [0, 0], [3, 2], [4, 6]])
    np.testing.assert_array_equal(ids[9], [[0, 5], [0, 0], [2, 3], [4, 7]])
    assert not ids[:, 1].any(), "layer 1 is dense"
    assert (ids[:, [0, 2, 3], 0] != ids[:, [0, 2, 3], 1]).all(), "a router selects distinct experts"
    assert npy(ids) == base64.b64decode(RECORDED)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i2", "<i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_http_round_trip(dtype, order):
    ids = np.array(np.arange(5 * 3 * 2).reshape(5, 3, 2) + 90, dtype, order=order)
    decoded = decode_vllm_http(text(npy(ids)))
    np.testing.assert_array_equal(decoded, ids)
    assert decoded.dtype == ids.dtype
    assert decoded.flags.c_contiguous and decoded.flags.writeable and decoded.flags.owndata


def test_three_hundred_experts():
    ids = np.arange(7 * 5 * 8).reshape(7, 5, 8).astype(np.uint16) + 20
    decoded = decode_vllm_http(text(npy(ids)))
    assert decoded.max() == 299
    np.testing.assert_array_equal(decoded, ids)


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    dtype=st.sampled_from(["u1", "<u2", "<i2", "<i4", "<i8"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_http_returns_what_was_saved(shape, dtype, seed):
    ids = np.random.default_rng(seed).integers(0, 128, shape).astype(dtype)
    np.testing.assert_array_equal(decode_vllm_http(text(npy(ids))), ids)


@given(length=st.integers(0, len(RECORDED) - 1))
def test_truncated_base64(length):
    with pytest.raises(ValueError, match="payload"):
        decode_vllm_http(RECORDED[:length])


@given(length=st.integers(0, len(base64.b64decode(RECORDED)) - 1))
def test_truncated_file(length):
    with pytest.raises(ValueError, match="no .npy file"):
        decode_vllm_http(text(base64.b64decode(RECORDED)[:length]))


@given(position=st.integers(0, 127), value=st.integers(0, 255))
def test_flipped_header_byte_is_refused_or_harmless(position, value):
    data = bytearray(base64.b64decode(RECORDED))
    data[position] = value
    try:
        ids = decode_vllm_http(text(bytes(data)))
    except ValueError as error:
        assert "payload" in str(error)
    else:
        # The dtype, the order or the split of the 80 bytes may be another valid one, the bytes are the same.
        assert ids.ndim == 3 and ids.nbytes == 80


@given(data=st.binary(max_size=300))
def test_any_bytes(data):
    for payload in (text(data), text(b"\x93NUMPY\x01\x00" + data), data.decode("latin1")):
        with pytest.raises(ValueError, match="payload"):
            decode_vllm_http(payload)


@pytest.mark.parametrize("payload", ["\xe9" * 4, "AA A", "AAAA\n", "AAAA=", "====", "A===", "AA==AAAA", "AAA"])
def test_what_is_no_base64(payload):
    with pytest.raises(ValueError, match="no base64"):
        decode_vllm_http(payload)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the payload was unpickled",))


@pytest.mark.parametrize("descr", [b"|O", b"|O8"])
def test_pickles_are_not_opened(descr):
    body = pickle.dumps(_Bomb())
    for payload in (
        text(body),
        npy_with_header(HEADER.replace(b"|u1", descr) + b"\n", body),
        npy_with_header(b"{'descr': '" + descr + b"', 'fortran_order': False, 'shape': (), }\n", body),
    ):
        with pytest.raises(ValueError, match="no .npy file"):
            decode_vllm_http(payload)


def test_object_array_of_numpy():
    with io.BytesIO() as file:
        np.save(file, np.array([[[_Bomb()]]], dtype=object), allow_pickle=True)
        payload = text(file.getvalue())
    with pytest.raises(ValueError, match=r"its dtype is '\|O'"):
        decode_vllm_http(payload)


@pytest.mark.parametrize("dtype", [">u2", ">i4", "<u4", "<u8", "i1", "<f4", "?", "<c8", "<M8[s]"])
def test_other_dtypes(dtype):
    with pytest.raises(ValueError, match="expected one of"):
        decode_vllm_http(text(npy(np.zeros((2, 3, 4)).astype(dtype))))


@pytest.mark.parametrize("shape", [(), (24,), (6, 4), (1, 2, 3, 4), (0, 4, 2), (3, 0, 2)])
def test_wrong_number_of_dimensions(shape):
    with pytest.raises(ValueError, match="Expected 3 dimensions of at least 1"):
        decode_vllm_http(text(npy(np.zeros(shape, np.uint8))))


@pytest.mark.parametrize(
    "shape",
    [
        b"(-3, -4, 2)",
        b"(3, 4, -2)",
        b"(3, 4, 3)",
        b"(999999999, 48, 8)",
        b"(4611686018427387904, 4, 2)",
        b"(18446744073709551619, 4, 2)",  # 3 modulo 2**64
        b"(" + b"9" * 60 + b", 4, 2)",
        b"(3 , 4, 2) or (3",
        b"(, , )",
        b"(- 3, 4, 2)",
    ],
)
def test_shape_that_does_not_fit_allocates_nothing(shape):
    payload = npy_with_header(HEADER.replace(b"(3, 4, 2)", shape) + b"\n", bytes(24))
    with peak_below(1 << 20), pytest.raises(ValueError, match="no .npy file"):
        decode_vllm_http(payload)


def test_a_space_behind_the_last_dimension_is_harmless():
    payload = npy_with_header(HEADER.replace(b"(3, 4, 2)", b"(3, 4, 2, )") + b"\n", bytes(24))
    assert decode_vllm_http(payload).shape == (3, 4, 2)


@pytest.mark.parametrize("filler", [b" " * 65000, b"(" * 65000, b"9" * 65000, b"'" * 65000])
@pytest.mark.parametrize("place", [0, 1, 30, len(HEADER)])
def test_huge_headers(filler, place):
    header = HEADER[:place] + filler + HEADER[place:] + b"\n"
    payload = npy_with_header(header, bytes(24))
    with peak_below(1 << 20), pytest.raises(ValueError, match="no .npy file"):
        decode_vllm_http(payload)


def test_padding_is_legal():
    assert decode_vllm_http(npy_with_header(HEADER + b" " * 8000 + b"\n", bytes(24))).shape == (3, 4, 2)


def test_header_that_ends_elsewhere():
    data = base64.b64decode(npy_with_header(HEADER + b"\n", bytes(24)))
    with pytest.raises(ValueError, match=rf"expected {len(HEADER) + 1} bytes got 30"):
        decode_vllm_http(text(data[:40]))
    with pytest.raises(ValueError, match="its header cannot be read: "):
        decode_vllm_http(npy_with_header(HEADER + b"\n" + b"more", bytes(24)))


@pytest.mark.parametrize("version", [b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\x01\x01"])
def test_other_npy_versions(version):
    with pytest.raises(ValueError, match=r"its version is \(\d, \d\), expected \(1, 0\)"):
        decode_vllm_http(npy_with_header(HEADER + b"\n", bytes(24), version))


@pytest.mark.parametrize("tail", [b"", b"\x00"])
def test_bytes_missing_or_left_over(tail):
    body = bytes(23) if not tail else bytes(24) + tail
    with pytest.raises(ValueError, match=rf"shape \(3, 4, 2\) of uint8, 24 bytes, but {len(body)} follow"):
        decode_vllm_http(npy_with_header(HEADER + b"\n", body))


def test_memory_is_bounded_by_the_payload():
    payload = text(npy(np.zeros((1024, 48, 8), np.uint8)))
    with peak_below(2 * len(payload)):
        decode_vllm_http(payload)


def test_absent_fields_name_the_flag():
    with pytest.raises(ValueError, match="--enable-return-routed-experts.*VLLM_USE_V2_MODEL_RUNNER=1"):
        decode_vllm_http(None)
    with pytest.raises(ValueError, match="enable_return_routed_experts=True.*VLLM_USE_V2_MODEL_RUNNER=1"):
        decode_vllm_output(SimpleNamespace(routed_experts=None))
    with pytest.raises(ValueError, match="return_routed_experts=True"):
        decode_sglang(None, 3, 4, 2)


@given(shape=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 2**32 - 1))
def test_sglang_round_trip(shape, seed):
    ids = np.random.default_rng(seed).integers(0, 512, shape, dtype=np.int32)
    decoded = decode_sglang(text(ids.astype("<i4").tobytes()), *shape)
    np.testing.assert_array_equal(decoded, ids)
    assert decoded.dtype == np.int32 and decoded.flags.writeable and decoded.flags.owndata


@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 3, 2), (3, 3, 1), (10**12, 10**12, 8)])
def test_sglang_of_another_size(shape):
    expected = 4 * shape[0] * shape[1] * shape[2]
    with pytest.raises(ValueError, match=rf"has 72 bytes, expected {expected}: {shape[0]} rows x {shape[1]}"):
        decode_sglang(text(bytes(72)), *shape)


@given(payload=st.text(max_size=50))
def test_sglang_any_text(payload):
    with pytest.raises(ValueError, match="SGLang payload"):
        decode_sglang(payload, 3, 4, 2)


@pytest.mark.parametrize("shape", [(0, 4, 2), (-1, -4, 2)])
def test_sglang_refuses_an_empty_shape(shape):
    with pytest.raises(ValueError, match="must be at least 1"):
        decode_sglang("", *shape)
