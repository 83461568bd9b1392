"""What `infer.py` writes: results kept between runs, and the competition's CSV."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from openfwi.npy import MAP_SHAPE
from utils import read_lines, write_atomic

MAP_FIELD = ("vel", "f4", MAP_SHAPE)  # of a result
HEADER = "oid_ypos," + ",".join(f"x_{x}" for x in range(1, 70, 2)) + "\n"

# ---------------------------------------------------------------- the CSV

# every number 0.00 … 9999.99 is written with as many characters: ",dddd.dd"
_DIGITS = np.array([1000, 100, 10, 1], np.int64)


def submission_rows(oid, vel):
    """The 70 CSV rows of one map, as bytes: (70, 70) m/s, odd columns, two decimals."""
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
    """Write the competition's CSV, whole or not at all: maps (N, 70, 70) m/s, an array or a memory map."""
    try:
        with write_atomic(path) as part, open(part, "wb", buffering=1 << 20) as file:
            file.write(HEADER.encode())
            for i, oid in enumerate(oids):
                file.write(submission_rows(oid, np.asarray(maps[i])))
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path, error):
    return OSError(
        f"{path}: not written ({error.strerror}); free some space and give the same command again: "
        "what is done is kept"
    )


# ---------------------------------------------------------------- results kept between runs


class Results:
    """One record a gather in a file, so that an interrupted run goes on: fields by name, put once.

    A record's last byte says that it is complete, and is written with it.
    """

    def __init__(self, path, n, fields):
        """fields: (name, dtype) or (name, dtype, shape) each; `n` records."""
        self.path, self.dtype = Path(path), np.dtype([*fields, ("done", "u1")])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = n * self.dtype.itemsize
        with open(self.path, "ab") as file:
            file.truncate(size)  # a hole reads as zeros: nothing is done
        self.records = np.memmap(self.path, self.dtype, "r", shape=(n,))

    def __getitem__(self, name):
        return self.records[name]

    def put(self, numbers, **fields):
        """Write the records `numbers`; each field's values have one row a number."""
        records = np.zeros(len(numbers), self.dtype)
        for name, values in fields.items():
            records[name] = values
        records["done"] = 1
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for number, record in zip(numbers, records, strict=True):
                    if os.pwrite(file.fileno(), record.tobytes(), number * record.nbytes) < record.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _not_written(self.path, error) from None

    def todo(self, batch_size):
        """The batches [[number, …], …] with a record to be done, always cut alike: resuming changes none."""
        n, done = len(self.records), self.records["done"]
        starts = range(0, n, batch_size)
        return [list(range(k, min(k + batch_size, n))) for k in starts if not done[k : k + batch_size].all()]


class Work:
    """The folder `<out>.work/`: results of an unfinished run, there until its output is complete."""

    def __init__(self, out):
        self.folder = Path(f"{out}.work")

    def results(self, name, job, n, fields):
        """Results kept under a name for a job, {what decides them: value}; another job's are dropped."""
        path = self.folder / f"{name}-{digest(job)}.bin"
        if path.exists():
            results = Results(path, n, fields)
            print(f"{path}: going on, {int(results['done'].sum())} of {n} done")
            return results
        for stale in self.folder.glob(f"{name}-*.bin"):
            print(f"{stale}: of other options or files; starting afresh")
            stale.unlink()
        return Results(path, n, fields)

    def note(self, name, oids, traces):
        """Keep what a method tells of each sample: a line of JSON each, the last one of an id counts."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            for oid, trace in zip(oids, traces, strict=True):
                file.write(
                    "\n" + json.dumps({"oid": oid, **trace})
                )  # begins a line: the last may be cut short

    def notes(self, name):
        """{oid: what was noted}."""
        found = {}
        for line in read_lines(self.folder / name):
            with contextlib.suppress(ValueError):
                note = json.loads(line)
                found[note["oid"]] = note
        return found

    def remove(self):
        shutil.rmtree(self.folder)


def digest(job):
    """A short hash of what `json` can write."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(paths):
    """A short hash of files' names, sizes and times: another one when one of them changes."""
    stats = {str(path): os.stat(path) for path in paths}
    return digest([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()])
