"""The competition's CSV, and the check of the velocities written into it."""

import numpy as np

from inference.results import not_written
from openfwi.npy import MAP_SHAPE
from system.files import write_atomic

MAP_FIELD = ("vel", "f4", MAP_SHAPE)  # the field of a result that holds its map

HEADER = "oid_ypos," + ",".join(f"x_{x}" for x in range(1, 70, 2)) + "\n"

# every number from 0.00 to 9999.99 takes the same number of characters: ",dddd.dd"
_DIGITS = np.array([1000, 100, 10, 1], np.int64)


def check_velocities(maps, names, what):
    """Raise ValueError for the first of the maps, an array (B, ...), with a value that is no velocity in m/s.

    names: of the maps' gathers; what: where the maps come from, for the message, as "best.pt predicts".
    """
    maps = maps.reshape(len(maps), -1)
    bad = ~((maps > 0) & (maps < 9999.99)).all(1)  # NaN is neither
    if bad.any():
        i = int(bad.argmax())
        low, high = maps[i].min(), maps[i].max()
        raise ValueError(
            f"{names[i]}: {what} {low:g} to {high:g}, expected velocities in m/s; is the gather in OpenFWI's "
            "units, about ±50? with 16 bits, try --precision=float32"
        )


def submission_rows(oid, vel):
    """The 70 CSV rows of a map (70, 70) m/s, as bytes: odd columns, two decimals.

    Raises ValueError, which names the id, for values that are no velocities.
    """
    check_velocities(vel[None], [oid], "its map holds")
    hundredths = np.rint(vel[:, 1::2].astype(np.float64) * 100).astype(np.int64)
    whole, rest = np.divmod(hundredths, 100)
    text = np.full((*whole.shape, 8), ord(","), np.uint8)
    text[..., 1:5] = whole[..., None] // _DIGITS % 10 + ord("0")
    text[..., 5] = ord(".")
    text[..., 6] = rest // 10 + ord("0")
    text[..., 7] = rest % 10 + ord("0")
    name = oid.encode()
    return b"".join(b"%s_y_%d%s\n" % (name, y, row.tobytes()) for y, row in enumerate(text))


def write_submission(path, oids, maps):
    """Write the competition's CSV, complete or not at all: maps (N, 70, 70) m/s, an array or memory map."""
    try:
        with write_atomic(path) as file:
            file.write(HEADER.encode())
            for i, oid in enumerate(oids):
                file.write(submission_rows(oid, np.asarray(maps[i])))
    except OSError as error:
        raise not_written(path, error) from None
