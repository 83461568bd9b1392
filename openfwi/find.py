"""Files found below a folder, and what their names say: gathers or velocity maps, and of which family."""

import os
import re
from pathlib import Path

from utils import FAMILIES, check_family

SEIS_NAME = re.compile(r"(data|seis)(\d+|\d+_\d+_\d+)\.npy", re.IGNORECASE | re.ASCII)

VEL_NAME = re.compile(r"(model|vel)(\d+|\d+_\d+_\d+)\.npy", re.IGNORECASE | re.ASCII)

ANY_NPY = re.compile(r"[^.].*\.npy", re.IGNORECASE | re.ASCII | re.DOTALL)  # hidden files are ignored
LIKE_NPY = re.compile(r"[^.].*\.np.*", re.IGNORECASE | re.ASCII | re.DOTALL)  # as .npz, .npy.gz, .npy.part

VEL_PREFIX = {"data": "model", "seis": "vel"}
SEIS_PREFIX = {vel: seis for seis, vel in VEL_PREFIX.items()}


def family_in(path):
    """The family named by the nearest folder above a file, or None."""
    names = {family.lower(): family for family in FAMILIES}
    return next((names[folder.name.lower()] for folder in path.parents if folder.name.lower() in names), None)


def family_of(path):
    """As `family_in`, but raises ValueError for a file that no family's folder holds."""
    if family := family_in(path):
        return family
    folder = path.parent.parent if path.parent.name.lower() in VEL_PREFIX else path.parent
    try:
        return check_family(folder.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; rename the folder to its family") from None


def find_files(root, pattern, problems=None):
    """Files below `root` whose names match the pattern, in natural order.

    Links are followed, but every folder is visited once; hidden folders are ignored. A folder that cannot be
    read, or a link to one that is not there, raises ValueError, or is added to `problems` if that is given.
    """
    found, seen = [], set()

    def report(problem):
        if problems is None:
            raise ValueError(problem)
        problems.append(problem)

    def unreadable(error):
        report(
            f"{error.filename}: folder cannot be read ({error.strerror}); "
            "check its permissions, or move it elsewhere"
        )

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        try:
            status = os.stat(folder)
        except OSError as error:
            unreadable(error)
            continue
        # some file systems, as of Windows, do not number their folders: the path identifies them
        identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        for name in names:
            path = os.path.join(folder, name)
            if pattern.fullmatch(name):
                found.append(path)
            elif "." not in name and os.path.islink(path) and not os.path.exists(path):
                report(
                    f"{path}: a link to {os.readlink(path)}, which is not there; mount or bring back "
                    "that folder, or remove the link"
                )
    found.sort(key=lambda path: [int(w) if w.isdecimal() else w for w in re.split(r"([0-9]+)", path)])
    return [Path(path) for path in found]


def find_npy(root, problems=None):
    """The .npy files below `root`, as `find_files`; prints how many others may have been meant, as .npz."""
    files = find_files(root, LIKE_NPY, problems)
    found = [path for path in files if ANY_NPY.fullmatch(path.name)]
    say_left_out([path for path in files if not ANY_NPY.fullmatch(path.name)], "not .npy", "file")
    return found


def velocity_name(seis_name):
    """The name of the velocity file that belongs to a seismic file; other names are returned unchanged."""
    return SEIS_NAME.sub(lambda m: f"{VEL_PREFIX[m[1].lower()]}{m[2]}.npy", seis_name)


def velocity_of(seis):
    """The velocity file of a seismic file: in the same folder, or in the folder `model` next to `data`.

    Upper and lower case are the same. Raises ValueError if there is none, or more than one.
    """
    name = velocity_name(seis.name)
    prefix = VEL_NAME.fullmatch(name)[1]
    for vel in (seis.parent.parent / prefix / name, seis.parent / name):
        if os.path.isfile(vel):
            return vel
    folders = [*_entries(seis.parent.parent, prefix), seis.parent]
    found = [vel for folder in folders for vel in _entries(folder, name) if os.path.isfile(vel)]
    if len(found) == 1:
        return found[0]
    what = f"several files fit: {', '.join(vel.name for vel in found)}" if found else "no velocity file"
    raise ValueError(f"{seis}: {what} {name} in its folder or in a folder {prefix}/")


def _entries(folder, name):
    """Entries of a folder with this name, in upper or lower case."""
    try:
        return [folder / entry for entry in os.listdir(folder) if entry.lower() == name]
    except OSError:
        return []


def say_left_out(paths, why, what=".npy file"):
    """Print how many files are left out, why, and the first of them, if there are any."""
    if paths:
        number = f"1 {what} is" if len(paths) == 1 else f"{len(paths)} {what}s are"
        print(f"left out: {number} {why}, first: {paths[0]}", flush=True)


def say_unused(files):
    """Print how many of these .npy files are named neither as gathers nor as maps, or are maps alone."""
    gathers = [path for path in files if SEIS_NAME.fullmatch(path.name)]
    maps = [path for path in files if VEL_NAME.fullmatch(path.name)]
    known = {*gathers, *maps}
    say_left_out([path for path in files if path not in known], "not named as data")
    places = {(folder, path.name.lower()) for path in gathers for folder in (path.parent, path.parent.parent)}

    def is_alone(path):
        prefix, numbers = VEL_NAME.fullmatch(path.name).groups()
        name = f"{SEIS_PREFIX[prefix.lower()]}{numbers}.npy"
        return not {(path.parent, name), (path.parent.parent, name)} & places

    say_left_out([path for path in maps if is_alone(path)], "without gathers", "velocity file")
