"""One rule for every output: it replaces only a file such as is written there, and lies on no input."""

import os
import re
from pathlib import Path

BEGINS = {  # what is written: how such a file begins
    "picture": rb"\x89PNG\r\n",
    "JSON": rb"\s*[{\[]",
    "submission": rb"oid_ypos,",
    "table of misfits": rb"oid,",
    "file of traces": rb'\{"oid"',
    "file of --fit": rb'\{"ensemble_weights"',
    "velocity map": rb"\x93NUMPY.{4}\{'descr': '<f4', 'fortran_order': False, 'shape': \(70, 70\)",
    "file of weights": rb".{6}\0\0\{",  # .safetensors
    "card of weights": rb'\{\s*"sha256"',
}


def check_replaces(path, kind):
    """Raise ValueError if `path` is there and is no file such as is to be written, `kind` of BEGINS.

    So no slip on a command line costs a checkpoint or data. An empty file may always be replaced.
    """
    if not os.path.exists(path):  # unlike pathlib's, it takes any text
        return
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is no file; give another path for the {kind}")
    with open(path, "rb") as file:
        head = file.read(128)
    if head and not re.match(BEGINS[kind], head, re.DOTALL):
        raise ValueError(f"{path}: is there already and no {kind}; give another path, or remove it first")


def check_outside(option, place, inputs):
    """Raise ValueError if the folder `place`, for .npy files, lies in one of the folders that are read."""
    resolved = Path(place).resolve()
    for folder in map(Path, inputs):
        if folder.is_dir() and folder.resolve() in (resolved, *resolved.parents):
            raise ValueError(
                f"--{option}={place}: lies in {folder}, which is read: its files would be taken for inputs; "
                f"give a folder elsewhere by --{option}=DIR"
            )
