"""The index: headers of many files, kept between runs in the user's cache folder."""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openfwi.npy import NpyFile, read_header
from system.files import write_atomic

N_READERS = 8  # threads that wait for the disk while files are indexed or checked

SETTLED_NS = 2_000_000_000  # a file changed later than this before indexing could change again unnoticed


class Index:
    """The headers of the files under a folder, kept between runs in the user's cache folder.

    A header is read again if the file's size or times have changed, or were too recent to show a change. A
    cache that cannot be read or written, or is damaged, is ignored.
    """

    def __init__(self, root):
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
        self.cache = Path(folder, "openfwi-index", f"{name}.json")
        try:
            kept = json.loads(self.cache.read_text(encoding="utf-8"))
            self.known = dict(kept["files"]) if kept["sha256"] == _checksum(kept["files"]) else {}
        except (OSError, ValueError, TypeError, KeyError):
            self.known = {}

    def remembered(self, path):
        """The kept header of a file, or None if the file has changed since."""
        try:
            status = os.stat(path)
            shape, kind, offset, *times = self.known[str(path)]
            file = NpyFile(path, tuple(shape), np.dtype(kind), offset, *times)
            same = (file.n_bytes, *times) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (OSError, KeyError, ValueError, TypeError):
            return None
        return file if same else None

    def headers(self, paths):
        """{path: header, or the ValueError it raised} of many files, read by threads; keeps the good ones."""
        settled = time.time_ns() - SETTLED_NS
        found = {path: self.remembered(path) for path in paths}
        missing = [path for path, file in found.items() if file is None]
        with ThreadPoolExecutor(N_READERS) as pool:
            found |= zip(missing, pool.map(_header_or_error, missing), strict=True)
        entries = {
            str(path): [file.shape, file.stored.str, file.offset, file.mtime_ns, file.ctime_ns]
            for path, file in found.items()
            if isinstance(file, NpyFile) and max(file.mtime_ns, file.ctime_ns) < settled
        }
        if json.loads(json.dumps(entries)) != self.known:
            text = json.dumps({"sha256": _checksum(entries), "files": entries})
            with contextlib.suppress(OSError), write_atomic(self.cache, "w") as file:
                file.write(text)
        return found


def _checksum(entries):
    """Checksum of the index's entries, to detect a damaged or edited cache."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _header_or_error(path):
    try:
        return read_header(path)
    except ValueError as error:
        return error
