"""Results kept on disk, so that an interrupted prediction continues where it stopped."""

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from openfwi.gathers import DIGEST_BYTES, GatherDataset
from openfwi.inspect_data import sha256
from utils import read_lines, sole_use, write_atomic


def not_written(path, error):
    """The OSError to raise when a result could not be written."""
    return OSError(
        f"{path}: not written ({error.strerror}); free some space and give the same command again: "
        "what is done is kept"
    )


class Results:
    """A file with a record for each gather, whose fields are read by name and written once.

    The last byte of a record says that it is complete, and is written together with it.
    """

    def __init__(self, path, n, fields):
        """Open or make a file of n records; fields: (name, dtype) or (name, dtype, shape) each."""
        self.path, self.dtype = Path(path), np.dtype([*fields, ("done", "u1")])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = n * self.dtype.itemsize
        with open(self.path, "ab") as file:
            file.truncate(size)  # the new part reads as zeros: nothing is done
        self.records = np.memmap(self.path, self.dtype, "r", shape=(n,))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, name):
        return self.records[name]

    def put(self, numbers, **fields):
        """Write the records `numbers`; the values of each field have a row for each number."""
        records = np.zeros(len(numbers), self.dtype)
        for name, values in fields.items():
            records[name] = values
        records["done"] = 1
        self._write(numbers, records)

    def forget(self, where):
        """Mark the records where the mask (n,) is true as not done."""
        numbers = np.flatnonzero(where & (self["done"] == 1)).tolist()
        self._write(numbers, np.zeros(len(numbers), self.dtype))

    def _write(self, numbers, records):
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for number, record in zip(numbers, records, strict=True):
                    file.seek(number * record.nbytes)
                    if file.write(record.tobytes()) < record.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise not_written(self.path, error) from None

    def todo(self, batches):
        """The batches, of [[number, ...], ...], in which a record is not done.

        Batches stay whole, so that a resumed run computes the same batches as an undisturbed one.
        """
        done = self.records["done"]
        return [numbers for numbers in batches if not done[numbers].all()]

    # notes and maps that belong to a record, in files next to this one

    def note(self, numbers, traces):
        """Keep a dictionary for JSON of each record. The last one noted for a number counts."""
        with open(self._next_to("trace.jsonl"), "a", encoding="utf-8") as file:
            for number, trace in zip(numbers, traces, strict=True):
                # a line break first, since the last line may have been cut short
                file.write("\n" + json.dumps({"number": number, **trace}))

    def notes(self):
        """Every dictionary noted so far, in order, each with the "number" of its record."""
        for line in read_lines(self._next_to("trace.jsonl")):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def keep_steps(self, number, steps):
        """Keep the maps on the way to a result, [(what, (70, 70) map), ...]."""
        with write_atomic(self._next_to(f"steps{number}.npz")) as file:
            np.savez(file, **{f"{k:03} {what}": vel for k, (what, vel) in enumerate(steps)})

    def steps_of(self, number):
        """The steps kept for a record, or an empty list."""
        path = self._next_to(f"steps{number}.npz")
        if not path.exists():
            return []
        with np.load(path, allow_pickle=False) as file:
            return [(name[4:], file[name]) for name in file]

    def _next_to(self, name):
        """The path of this file with another ending."""
        return self.path.with_suffix(f".{name}")


class Work:
    """The folder `<out>.work/`, which holds the results of an unfinished run until its output is complete.

    Use it in a `with`: it then belongs to this process alone. Raises ValueError if another process has it.
    """

    RESULT_NAME = re.compile(r"[a-z]+\d*-[0-9a-f]{16}\..+")

    def __init__(self, out):
        self.folder, self.held = Path(f"{out}.work"), contextlib.ExitStack()

    def __enter__(self):
        self.held.enter_context(sole_use(self.folder))
        return self

    def __exit__(self, *error):
        if not any(self.RESULT_NAME.fullmatch(path.name) for path in self.folder.iterdir()):
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files lie there
                self.folder.rmdir()
        self.held.close()

    def results(self, name, job, n, fields):
        """Results kept under a name for a job, {what decides them: value}; another job's are removed."""
        path = self.folder / f"{name}-{digest(job)}.bin"
        if path.exists():
            results = Results(path, n, fields)
            print(f"{path}: going on, {int(results['done'].sum())} of {n} done")
            return results
        for stale in self.folder.glob(f"{name}-*"):
            if stale.suffix == ".bin":
                print(f"{stale}: of other options or files; starting afresh")
            stale.unlink()
        return Results(path, n, fields)

    def remove(self):
        """Remove all results, once the output is complete, and no other file that may lie there."""
        for path in self.folder.iterdir():
            if self.RESULT_NAME.fullmatch(path.name):
                path.unlink()


# ---------------------------------------------------------------- have inputs changed?


def digest(job):
    """A short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(path):
    """A short hash of a file's contents."""
    return sha256(path)[:16]


# fields of a record: a hash of the gather it was made from, and the stamp of the gather's file
GATHER_FIELDS = [("gather", "u1", (DIGEST_BYTES,)), ("stamp", "i8", (3,))]


def forget_changed(results, gathers):
    """Forget the records whose gathers have changed since.

    A file of the same size and times is taken to be unchanged; gathers of all other files are read again.
    """
    stamps = np.array([gather.stamp for gather in gathers])
    unchanged = (results["stamp"] == stamps).all(1) & (stamps[:, 0] > 0)
    dataset, changed = GatherDataset(gathers), np.zeros(len(gathers), bool)
    for i in np.flatnonzero((results["done"] == 1) & ~unchanged).tolist():
        changed[i] = (dataset.read_batch([i])[1].numpy() != results["gather"][i]).any()
    if changed.any():
        print(f"{gathers[changed.argmax()]}: another gather than before; predicting {changed.sum()} again")
        results.forget(changed)
