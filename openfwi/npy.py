""".npy files: headers checked, rows read straight to where they belong.

Samples are read with plain reads into the caller's memory, not through memory maps: as fast, no file stays
open, and a file that is cut off meanwhile is an error with a name, where a map would kill the process.
"""

import functools
import io
import math
import os
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GATHER_SHAPE, MAP_SHAPE = (5, 1000, 70), (1, 70, 70)
_PARSING = threading.Lock()  # threads that parse at once make Python 3.11 fail at times (its issue 106905)


@dataclass(frozen=True)
class NpyFile:
    """A .npy file's header and what the file was like then; its rows are read where asked for."""

    path: Path
    shape: tuple
    dtype: np.dtype
    offset: int  # bytes before the first value
    mtime_ns: int
    ctime_ns: int  # changes, too, when another file takes the name with its old time

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    n_bytes = property(lambda self: self.offset + self.size * self.dtype.itemsize)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return self.read_into(index, np.empty(self.shape[1:], self.dtype))

    def __array__(self, dtype=None, copy=None):
        whole = self._read(self.offset, np.empty(self.shape, self.dtype))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def read_into(self, index, out):
        """Row `index` read straight into `out`, contiguous and of its shape and dtype; returns `out`.

        Raises ValueError, naming the file, where it is gone, cut off, or another one than was indexed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        assert out.nbytes == (self.n_bytes - self.offset) // len(self) and out.dtype == self.dtype, out.shape
        return self._read(self.offset + index * out.nbytes, out)

    def _read(self, begin, out):
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.lseek(file, begin, os.SEEK_SET)
                left = memoryview(out.reshape(-1).view(np.uint8))
                while left and (n := os.readv(file, [left])):
                    left = left[n:]
                status = os.fstat(file)  # after the read: what changed during it shows as well
            finally:
                os.close(file)
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be read ({error.strerror}); it was there when the files were indexed"
            ) from None
        if left or (status.st_size, status.st_mtime_ns) != (self.n_bytes, self.mtime_ns):
            raise ValueError(
                f"{self.path}: {status.st_size} bytes, expected {self.n_bytes} as indexed, untouched since: "
                "truncated or overwritten while in use; copy it again and restart"
            )
        return out


def read_header(path):
    """The header of a .npy file of floats as an `NpyFile`; ValueError says what keeps it from being read."""
    try:
        with open(path, "rb", buffering=0) as file:
            begin, status = file.read(16384), os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check the disk and permissions"
        ) from None
    header = io.BytesIO(begin)
    try:
        version = np.lib.format.read_magic(header)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        with _PARSING:
            shape, is_fortran, dtype = read[version](header)
    except (ValueError, KeyError, EOFError) as error:
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path}: an .npz archive, not a .npy file; unpack it") from None
        raise ValueError(f"{path}: truncated or not a .npy file ({error}); copy it again") from None
    kinds = "expected float16, float32 or float64"
    if dtype.hasobject:
        raise ValueError(
            f"{path}: Python objects (dtype {dtype}), {kinds}; save it again as np.stack(array).astype('f4')"
        )
    if not dtype.isnative:
        raise ValueError(
            f"{path}: big-endian bytes (dtype {dtype.str}), {kinds} of this machine's order; "
            f"save it again as array.astype('{dtype.str.replace('>', '<')}')"
        )
    if dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path}: dtype {dtype}, {kinds}")
    if is_fortran:
        raise ValueError(
            f"{path}: Fortran order, expected C order, sample after sample; "
            "save it again as np.ascontiguousarray(array)"
        )
    file = NpyFile(Path(path), shape, dtype, header.tell(), status.st_mtime_ns, status.st_ctime_ns)
    if status.st_size != file.n_bytes:
        what = "truncated" if status.st_size < file.n_bytes else "overwritten or damaged"
        raise ValueError(
            f"{path}: {what}: {status.st_size} bytes, expected {file.n_bytes} by its header; copy it again"
        )
    return file


@functools.lru_cache(maxsize=64)
def open_array(path):
    """As `read_header`, remembered: the file's rows by [index], all of it by np.array; nothing stays open."""
    return read_header(path)


def check_shape(file, shapes, what):
    """Raise ValueError, got and expected, unless the file has one of `shapes` (None = any length)."""
    fits = [
        len(shape) == file.ndim and all(a in (None, b) for a, b in zip(shape, file.shape, strict=False))
        for shape in shapes
    ]
    if not any(fits) or not file.size:
        expected = " or ".join(str(shape).replace("None", "n") for shape in shapes)
        hint = ""
        if not any(fits) and {MAP_SHAPE, GATHER_SHAPE} == {file.shape[1:], shapes[0][1:]}:
            hint = ": seismic and velocity are swapped; exchange the two files' names"
        raise ValueError(f"{file.path}: shape {file.shape}, expected {expected} for {what}{hint}")
    return file


def check_array(path, shapes, what):
    """Open a .npy file of floats in one of `shapes` (None = any length); ValueError says got and expected."""
    return check_shape(open_array(path), shapes, what)


def is_finite(values):
    """Whether all values are finite; float16 by its bits, forty times as fast as numpy's own test."""
    values = np.asarray(values)
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    # infinity and NaN have all exponent bits: the largest numbers of either sign, read as integers
    return bool(values.view(np.int16).max() < 0x7C00 and values.view(np.uint16).max() < 0xFC00)


def check_finite(values, path, index, what):
    """Raise ValueError naming file and sample unless every value is finite."""
    if not is_finite(values):
        raise ValueError(f"{path}: sample {index} of the {what} holds NaN or infinity; copy or make it again")
