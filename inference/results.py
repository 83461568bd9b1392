"""Results kept between runs, so that an interrupted prediction goes on."""

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

    def __len__(self):
        return len(self.records)

    def __getitem__(self, name):
        return self.records[name]

    def put(self, numbers, **fields):
        """Write the records `numbers`; each field's values have one row a number."""
        records = np.zeros(len(numbers), self.dtype)
        for name, values in fields.items():
            records[name] = values
        records["done"] = 1
        self._write(numbers, records)

    def forget(self, where):
        """Of the records where the mask (n,) is true, make those that are done ones to be done again."""
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
        """Those of the batches [[number, …], …] that hold a record to be done.

        Whole batches, so that a resumed run computes the same batches as one that nothing disturbs.
        """
        done = self.records["done"]
        return [numbers for numbers in batches if not done[numbers].all()]

    # what is told of a record beside its fields

    def note(self, numbers, traces):
        """Keep a dict for JSON of each record: a line each, of which the last one of a number counts."""
        with open(self._beside("trace.jsonl"), "a", encoding="utf-8") as file:
            for number, trace in zip(numbers, traces, strict=True):
                # begins a line, for the last one may have been cut short
                file.write("\n" + json.dumps({"number": number, **trace}))

    def notes(self):
        """Every dict that was noted, in order, each with its record's "number"."""
        for line in read_lines(self._beside("trace.jsonl")):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def keep_steps(self, number, steps):
        """Keep maps on the way to a result, [(what, (70, 70) map), …]."""
        with write_atomic(self._beside(f"steps{number}.npz")) as file:
            np.savez(file, **{f"{k:03} {what}": vel for k, (what, vel) in enumerate(steps)})

    def steps_of(self, number):
        """What `keep_steps` has kept of a record; nothing where it was not called."""
        path = self._beside(f"steps{number}.npz")
        if not path.exists():
            return []
        with np.load(path, allow_pickle=False) as file:
            return [(name[4:], file[name]) for name in file]

    def _beside(self, name):
        return self.path.with_suffix(f".{name}")


class Work:
    """The folder `<out>.work/`: results of an unfinished run, there until its output is complete.

    Used as a context, it belongs to one process at a time; ValueError names the one that has it.
    """

    OURS = re.compile(r"[a-z]+\d*-[0-9a-f]{16}\..+")

    def __init__(self, out):
        self.folder, self.held = Path(f"{out}.work"), contextlib.ExitStack()

    def __enter__(self):
        self.held.enter_context(sole_use(self.folder))
        return self

    def __exit__(self, *error):
        if not any(self.OURS.fullmatch(path.name) for path in self.folder.iterdir()):  # nothing is kept
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others' files lie there
                self.folder.rmdir()
        self.held.close()

    def results(self, name, job, n, fields):
        """Results kept under a name for a job, {what decides them: value}; another job's are dropped."""
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
        """Remove every result, once the output is complete; nothing else that may lie there."""
        for path in self.folder.iterdir():
            if self.OURS.fullmatch(path.name):
                path.unlink()


# ---------------------------------------------------------------- the same or not


def digest(job):
    """A short hash of what `json` can write."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(path):
    """A short hash of a file's contents."""
    return sha256(path)[:16]


# of a record: which gather it was made from, by contents, and the stamp of its file
GATHER_FIELDS = [("gather", "u1", (DIGEST_BYTES,)), ("stamp", "i8", (3,))]


def forget_changed(results, gathers):
    """Forget the records whose gathers are others now than those they were made from.

    Gathers in files of the same size and times are taken for the same; all others are read again.
    """
    stamps = np.array([gather.stamp for gather in gathers])
    is_sure = (results["stamp"] == stamps).all(1) & (stamps[:, 0] > 0)
    dataset, changed = GatherDataset(gathers), np.zeros(len(gathers), bool)
    for i in np.flatnonzero((results["done"] == 1) & ~is_sure).tolist():
        changed[i] = (dataset.read_batch([i])[1].numpy() != results["gather"][i]).any()
    if changed.any():
        print(f"{gathers[changed.argmax()]}: another gather than before; predicting {changed.sum()} again")
        results.forget(changed)
