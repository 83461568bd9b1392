"""Results kept on disk, so that an interrupted prediction continues where it stopped."""

import contextlib
import errno
import hashlib
import json
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from openfwi.gathers import DIGEST_BYTES, GatherDataset
from parallel.work import check_shared, on_all, wait_for_all
from system.files import read_lines, sha256, sole_use, write_atomic


def not_written(path, error):
    """The OSError to raise when a result could not be written."""
    return OSError(
        f"{path}: not written ({error.strerror}); free some space and run the same command again: finished "
        "work is kept"
    )


NOTES = "notes"  # ending of the file of all notes

RECORDS = {"records": "with checksums"}  # tells files from those of older versions


def checksum(number, record):
    """A checksum of a record, but for its last field, and of its number; never 0."""
    return zlib.crc32(record.tobytes()[: -record["checksum"].nbytes], int(number)) or 1


def is_sound(number, record):
    """Whether a record is complete and as it was put."""
    return record["checksum"] == checksum(number, record)


class Results:
    """A file with a record for each gather, whose fields are read by name and written once.

    Each record ends with a checksum of its number and fields; 0 = not done. A record that is damaged, or lies
    in the place of another, counts as not done. Where several processes share the work, each appends its
    records and notes to files of its own; rank 0 joins them.
    """

    def __init__(self, path, n, fields, part=""):
        """A file of n records; fields: (name, dtype) or (name, dtype, shape) each.

        part: a name for the files that only this process writes; "" if there is no other process.
        """
        self.path, self.n, self.part = Path(path), n, part
        self.dtype = np.dtype([*fields, ("checksum", "u4")])
        self.part_dtype = np.dtype([("number", "i8"), *self.dtype.descr])

    def make(self):
        """Make the file if it is missing, with no record done, and open it; forgets damaged records."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self.n * self.dtype.itemsize)  # the new part reads as zeros: nothing is done
        damaged = self.open().done
        damaged[damaged] = [not is_sound(i, self.records[i]) for i in np.flatnonzero(damaged).tolist()]
        if damaged.any():
            print(f"{self.path}: {damaged.sum()} records are damaged and will be made again")
            self.forget(damaged)
        return self

    def open(self):
        """Read what has been put and joined so far; returns self."""
        self.records = np.memmap(self.path, self.dtype, "r", shape=(self.n,))
        return self

    def __len__(self):
        return self.n

    def __getitem__(self, name):
        return self.records[name]

    @property
    def done(self):
        """Which records are complete: (n,)."""
        return self.records["checksum"] != 0

    def put(self, numbers, **fields):
        """Write the records `numbers`; the values of each field have a row for each number."""
        records = np.zeros(len(numbers), self.dtype)
        for name, values in fields.items():
            records[name] = values
        records["checksum"] = [checksum(number, r) for number, r in zip(numbers, records, strict=True)]
        if self.part:
            numbered = np.empty(len(numbers), self.part_dtype)
            numbered["number"] = numbers
            for name in self.dtype.names:
                numbered[name] = records[name]
            self._append(numbered)
        else:
            self._write(numbers, records)

    def _append(self, records):
        path = self._next_to(f"{self.part}.part")
        try:
            with open(path, "ab", buffering=0) as file:
                if file.write(records.tobytes()) < records.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise not_written(path, error) from None

    def join(self, parts=()):
        """Add the records and notes of all processes, also of interrupted ones, to this file, and open it.

        parts: names of the files of the running processes, which a slow file system may not list yet.
        """
        stem = self.path.stem
        found = {path for end in ("part", "notes") for path in self.path.parent.glob(f"{stem}.*.{end}")}
        for part in sorted({path.name.split(".")[1] for path in found} | set(parts)):
            path, notes = self._next_to(f"{part}.part"), self._next_to(f"{part}.notes")
            n_bytes = path.stat().st_size if path.exists() else 0
            if n := n_bytes // self.part_dtype.itemsize:  # the last one may be cut short
                records = np.memmap(path, self.part_dtype, "r", shape=(n,))
                numbers, fields = records["number"], records[list(self.dtype.names)]
                # a power cut may have kept the length of a file but not its numbers
                inside = np.flatnonzero((0 <= numbers) & (numbers < self.n)).tolist()
                sound = [k for k in inside if is_sound(numbers[k], fields[k].astype(self.dtype))]
                self._write(numbers[sound].tolist(), (fields[k] for k in sound))
            if notes.exists():
                with open(self._next_to(NOTES), "ab") as file:
                    file.write(notes.read_bytes())
            for done in (notes, path):
                done.unlink(missing_ok=True)
        return self.open()

    def forget(self, where):
        """Mark the records where the mask (n,) is true as not done."""
        numbers = np.flatnonzero(where & self.done).tolist()
        self._write(numbers, np.zeros(len(numbers), self.dtype))

    def _write(self, numbers, records):
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for number, record in zip(numbers, records, strict=True):
                    file.seek(number * self.dtype.itemsize)
                    if file.write(record.astype(self.dtype).tobytes()) < self.dtype.itemsize:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise not_written(self.path, error) from None

    def todo(self, batches):
        """The batches, of [[number, ...], ...], in which a record is not done.

        Batches stay whole, so that a resumed run computes the same batches as an undisturbed one.
        """
        done = self.done
        return [numbers for numbers in batches if not done[numbers].all()]

    # notes and maps of a record, in files next to this one

    def note(self, numbers, traces):
        """Keep a dictionary for JSON of each record. The last one noted for a number counts."""
        path = self._next_to(f"{self.part}.notes" if self.part else NOTES)
        try:
            with open(path, "a", encoding="utf-8") as file:
                for number, trace in zip(numbers, traces, strict=True):
                    text = json.dumps({"number": number, **trace})
                    # a line break first, since the last line may have been cut short
                    file.write(f"\n{zlib.crc32(text.encode()):08x} {text}")
        except OSError as error:
            raise not_written(path, error) from None

    def notes(self):
        """Every dictionary noted so far, in order, each with the "number" of its record; no damaged ones."""
        for line in dict.fromkeys(read_lines(self._next_to(NOTES))):  # an interrupted `join` repeats some
            crc, _, text = line.partition(" ")
            if crc == f"{zlib.crc32(text.encode()):08x}":
                yield json.loads(text)

    def keep_steps(self, number, steps):
        """Save the intermediate maps of a result, [(what, (70, 70) map), ...]."""
        with write_atomic(self._next_to(f"steps{number}.npz")) as file:
            np.savez(file, **{f"{k:03} {what}": vel for k, (what, vel) in enumerate(steps)})

    def steps_of(self, number):
        """The intermediate maps of a record, or an empty list."""
        path = self._next_to(f"steps{number}.npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                return [(name[4:], file[name]) for name in file]
        except FileNotFoundError:
            return []
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            print(f"{path}: damaged, these steps are not drawn ({error})")
            return []

    def _next_to(self, name):
        """The path of this file with another ending."""
        return self.path.with_suffix(f".{name}")


class Work:
    """The folder `<out>.work/`, which holds the results of an unfinished run until its output is complete.

    Use it in a `with`, during which rank 0 locks it for all processes of this command. Raises ValueError if
    another command has it, or if a process sees another folder than rank 0.
    """

    RESULT_NAME = re.compile(r"[a-z]+\d*-[0-9a-f]{16}\..+")

    def __init__(self, out, process):
        self.folder, self.process, self.held = Path(f"{out}.work"), process, contextlib.ExitStack()

    def __enter__(self):
        on_all(self.process, self._lock)
        self.start = check_shared(self.process, self.folder)
        return self

    def _lock(self):
        if self.process.is_main:
            self.held.enter_context(sole_use(self.folder))

    def __exit__(self, *error):
        if not self.process.is_main:
            return
        if not any(self.RESULT_NAME.fullmatch(path.name) for path in self.folder.iterdir()):
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds other files
                self.folder.rmdir()
        self.held.close()

    def results(self, name, job, n, fields, forget=lambda results: None, pause=lambda: None):
        """Results of a job, {what decides them: value}, saved under a name; those of another job are removed.

        forget(results) is called on rank 0 before any process sees them, and may mark records as not done.
        pause() is called while waiting for other processes, and may raise. Raises ValueError for results of
        an older version, which cannot be checked.
        """
        path = self.folder / f"{name}-{digest(job | RECORDS)}.bin"
        part = self._part(self.process.rank) if self.process.world > 1 else ""
        results = Results(path, n, fields, part)
        if self.process.is_main:
            is_known = path.exists()
            if not is_known and (old := self.folder / f"{name}-{digest(job)}.bin").exists():
                raise ValueError(
                    f"{old}: kept by an older version, without checksums; remove {self.folder} to "
                    "predict all again, or go on with that version"
                )
            for stale in () if is_known else self.folder.glob(f"{name}-*"):
                if stale.suffix == ".bin":
                    print(f"{stale}: made with other options or files; starting afresh")
                stale.unlink()
            results.make().join()
            forget(results)
            if is_known:
                print(f"{path}: going on, {results.done.sum()} of {n} done")
        wait_for_all(self.process, pause)
        return results.open()

    def join(self, results, pause=lambda: None):
        """Wait for all processes, then let each see the records of all; `pause` as above.

        Raises ValueError if a record is missing.
        """
        wait_for_all(self.process, pause)
        if self.process.is_main and self.process.world > 1:
            results.join([self._part(rank) for rank in range(self.process.world)])
        wait_for_all(self.process, pause)
        results.open()
        wait_for_all(self.process, pause)  # else rank 0 might end and remove them before they are opened
        if not results.done.all():
            raise ValueError(
                f"{results.path}: another process's results are not seen here; the same command continues"
            )

    def _part(self, rank):
        return f"{self.start}-{rank}"

    def remove(self):
        """Remove all results, once the output is complete, but no other files in the folder."""
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
    """Forget the records whose gathers have changed since they were made.

    A file of the same size and times counts as unchanged; the gathers of all other files are read again.
    """
    stamps = np.array([gather.stamp for gather in gathers])
    unchanged = (results["stamp"] == stamps).all(1) & (stamps[:, 0] > 0)
    dataset, changed = GatherDataset(gathers), np.zeros(len(gathers), bool)
    for i in np.flatnonzero(results.done & ~unchanged).tolist():
        changed[i] = (dataset.read_batch([i])[1].numpy() != results["gather"][i]).any()
    if changed.any():
        print(f"{gathers[changed.argmax()]}: not the same gather as before; predicting {changed.sum()} again")
        results.forget(changed)
