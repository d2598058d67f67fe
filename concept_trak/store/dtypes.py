"""How rows are stored: the number formats, and the header of an .npy that is written in pieces.

bfloat16 is kept as the uint16 of its upper float32 half: numpy has no such type, and this module
imports no torch.
"""

from __future__ import annotations

import io

import numpy as np

from ..errors import UserError

STORED_TYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}


def encode(rows: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> the stored type, rounding to nearest even; what overflows becomes infinite."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return rows.astype(STORED_TYPES[dtype])
    bits = np.ascontiguousarray(rows).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Inverse of `encode`: -> float32."""
    if dtype != "bfloat16":
        return stored.astype(np.float32, copy=False)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Which stored values are neither NaN nor infinite."""
    return (stored & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(stored)


def encode_checked(rows: np.ndarray, dtype: str, first_row: int) -> np.ndarray:
    """As `encode`, with a UserError that names the first sample whose row is not finite or does not
    fit.
    """
    message = "the gradient of sample {} is NaN or infinite; mend its picture, or set DTYPE=fp32"
    refuse_bad_rows(np.isfinite(rows), first_row, message)
    stored = encode(rows, dtype)
    remedy = "set STORE_DTYPE to bfloat16 or float32, or NORMALIZE=1"
    message = f"the gradient of sample {{}} is too large for {dtype}; {remedy}"
    refuse_bad_rows(finite(stored, dtype), first_row, message)
    return stored


def refuse_bad_rows(good: np.ndarray, first_row: int, message: str) -> None:
    """UserError, `message` with the number of the first sample whose values [b, ...] are not all
    good.
    """
    if not good.all():
        bad = np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))[0]
        raise UserError(message.format(first_row + int(bad)))


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What an .npy of that C-ordered array begins with, as `np.save` writes it."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(map(int, shape))}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
