"""Results kept between runs, so that an interrupted prediction goes on."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from utils import read_lines


def not_written(path, error):
    return OSError(
        f"{path}: not written ({error.strerror}); free some space and give the same command again: "
        "what is done is kept"
    )


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
            raise not_written(self.path, error) from None

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
