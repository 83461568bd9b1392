""".npy files: headers checked, rows read straight into the caller's memory.

Samples are read by plain reads, not through memory maps. This is as fast, no file stays open, and a file that
is cut off meanwhile is an error that names it, while a memory map would kill the process.
"""

import functools
import io
import math
import os
import stat
import threading
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GATHER_SHAPE, MAP_SHAPE = (5, 1000, 70), (1, 70, 70)
NUMBERS = tuple(map(np.dtype, ("f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4")))
_PARSING = threading.Lock()  # Python 3.11 sometimes fails if several threads parse at once (its issue 106905)


@dataclass(frozen=True)
class NpyFile:
    """The header of a .npy file, with the file's times; rows are read when they are asked for."""

    path: Path
    shape: tuple
    stored: np.dtype  # of the file; whole numbers are read as float32
    offset: int  # bytes before the first value
    mtime_ns: int
    ctime_ns: int  # changes even if another file replaces it and keeps the old mtime

    dtype = property(lambda self: self.stored if self.stored.kind == "f" else np.dtype(np.float32))
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    n_bytes = property(lambda self: self.offset + self.size * self.stored.itemsize)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return self.read_into(index, np.empty(self.shape[1:], self.dtype))

    def __array__(self, dtype=None, copy=None):
        whole = self._read(self.offset, np.empty(self.shape, self.dtype))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def read_into(self, index, out):
        """Read row `index` into `out`, a contiguous array of its shape and dtype; returns `out`.

        Raises ValueError, which names the file, if it is missing, cut off, or has changed since it was
        indexed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        assert out.size == self.size // len(self) and out.dtype == self.dtype, (out.shape, out.dtype)
        return self._read(self.offset + index * out.size * self.stored.itemsize, out)

    def _read(self, begin, out):
        into = out if out.dtype == self.stored else np.empty(out.shape, self.stored)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(begin)
                left = memoryview(into.reshape(-1).view(np.uint8))
                while left and (n := file.readinto(left)):
                    left = left[n:]
                status = os.fstat(file.fileno())  # after reading, so that a change meanwhile is seen too
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be read ({error.strerror}); it was there when the files were indexed"
            ) from None
        if left or (status.st_size, status.st_mtime_ns) != (self.n_bytes, self.mtime_ns):
            raise ValueError(
                f"{self.path}: {status.st_size} bytes, expected {self.n_bytes} as indexed, untouched since: "
                "truncated or overwritten while in use; copy it again and restart"
            )
        if into is not out:
            out[...] = into
        return out


def read_header(path):
    """Read the header of a .npy file of numbers: an `NpyFile`. Raises ValueError for anything else."""
    begin, status = _beginning(path)
    header = io.BytesIO(begin)
    try:
        with _PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers written by Python 2
            shape, is_fortran, dtype = _parse(header)
    except Exception as error:  # numpy evaluates the header's text: damaged, it can raise anything
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path}: an .npz archive, not a .npy file; unpack it") from None
        reason = " ".join(str(error).split())[:120].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{path}: truncated or not a .npy file ({reason}); copy it again") from None
    kinds = "expected float16, float32, float64, or whole numbers"
    if dtype.hasobject:
        raise ValueError(
            f"{path}: Python objects (dtype {dtype}), {kinds}; save it again as np.stack(array).astype('f4')"
        )
    if not dtype.isnative:
        raise ValueError(
            f"{path}: big-endian bytes (dtype {dtype.str}), {kinds} of this machine's order; "
            f"save it again as array.astype('{dtype.str.replace('>', '<')}')"
        )
    if dtype not in NUMBERS:
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


def _beginning(path):
    """The first bytes of a regular file, and its status. Pipes and devices are not opened."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError(
                f"{path}: a pipe, socket or device, expected a regular file; remove or rename it"
            )
        with open(path, "rb", buffering=0) as file:
            return file.read(16384), os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check the disk and permissions"
        ) from None


def _parse(header):
    """Shape, whether in Fortran order, and dtype, from a .npy file's header."""
    version = np.lib.format.read_magic(header)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(header)
    if version in ((2, 0), (3, 0)):  # version 3 differs from 2 only in names of fields
        return np.lib.format.read_array_header_2_0(header)
    raise ValueError(f"format version {version[0]}.{version[1]}")


@functools.lru_cache(maxsize=64)
def open_array(path):
    """`read_header`, cached: rows are read by [index], the whole file by np.array; no file stays open."""
    return read_header(path)


def check_shape(file, shapes, what):
    """Return the file if it has one of `shapes` (None = any length), else raise ValueError."""
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
    """Open a .npy file of numbers with one of `shapes` (None = any length), else raise ValueError."""
    return check_shape(open_array(path), shapes, what)


def is_finite(values):
    """Whether all values are finite; for float16 from its bits, forty times as fast as by numpy."""
    values = np.asarray(values)
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    # as integers, infinity and NaN are the largest numbers of either sign, since all exponent bits are set
    return bool(values.view(np.int16).max() < 0x7C00 and values.view(np.uint16).max() < 0xFC00)


def check_finite(values, path, index, what):
    """Raise ValueError, which names file and sample, unless every value is finite."""
    if not is_finite(values):
        raise ValueError(f"{path}: sample {index} of the {what} holds NaN or infinity; copy or make it again")
