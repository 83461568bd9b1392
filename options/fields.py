"""Declaring a program's options: dataclass fields that carry their section, meaning and limits."""

import dataclasses
import math
import os
from dataclasses import dataclass

from options.outputs import check_replaces

ITEMS = {str: "words, as strings", int: "whole numbers", float: "numbers"}
MOST = {int: 10**9, float: 1e12}  # what a number may be where its field says nothing else


@dataclass(frozen=True)
class Section:
    """A group of options. Call it to declare one: `lr: float = training(1e-4, "peak learning rate")`."""

    name: str
    meaning: str  # the heading in --help and docs/config.md
    programs: tuple = ()  # those whose --help shows the section
    decides: tuple = ()  # the results that depend on its options

    def __call__(
        self,
        default,
        meaning,
        *,
        programs=None,
        decides=None,
        choices=(),
        least=0,
        above=None,
        most=None,
        items=str,
        bare=None,
        path=False,
        writes=None,
    ):
        """A dataclass field.

        programs and decides replace the section's own. Numbers lie from `least` (or strictly above `above`)
        to `most`; in a sequence of numbers, `items` int or float, each of them does. `bare` is the value of
        the option written as a switch, for fields that are not booleans. In a `path`, or several divided by
        commas, "~" stands for the home folder, which a shell leaves as it is after "=". `writes` says what is
        written to a path, a kind of `outputs.BEGINS`: a file of another kind that is there is refused.
        """
        metadata = {
            "section": self,
            "meaning": meaning,
            "programs": self.programs if programs is None else programs,
            "decides": self.decides if decides is None else decides,
            "choices": choices,
            "least": least,
            "above": above,
            "most": most,
            "items": items,
            "bare": bare,
            "path": path or writes is not None,
            "writes": writes,
        }
        return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Options:
    """A program's options, its fields declared by a `Section`. Raises ValueError for wrong values."""

    def __post_init__(self):
        check_types(self)
        check_limits(self)
        expand_paths(self)
        for field in dataclasses.fields(self):
            if field.metadata["writes"] and (path := getattr(self, field.name)):
                check_replaces(path, field.metadata["writes"])


def check_types(options):
    """Give every field its declared type: an int becomes a float, a list a tuple.

    Raises ValueError, in one line, for a value of another type.
    """
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), field.type
        if kind is float and type(value) is int and abs(value) < 2**1023:  # others are too large anyhow
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind and not (kind == bool | str and isinstance(value, kind)):
            name = getattr(kind, "__name__", "true, false or str")
            raise ValueError(f"{field.name} = {value!r} is a {type(value).__name__}, expected {name}")
        setattr(options, field.name, value)


def check_limits(options):
    """Raise ValueError, in one line, for a value outside its field's choices or limits."""
    for field in dataclasses.fields(options):
        value, limits = getattr(options, field.name), field.metadata
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"--{field.name}={value}: expected one of {', '.join(limits['choices'])}")
        if field.type in (int, float):
            _check_number(field.name, value, value, field.type, limits)
        elif field.type is tuple:
            kind = limits["items"]
            for item in value:
                if type(item) is not kind and not (type(item) is int and kind is float):
                    raise ValueError(f"{field.name} = {value}: expected {ITEMS[kind]}")
                if kind is not str:
                    _check_number(field.name, item, ",".join(map(str, value)), kind, limits)


def check_gpus(gpus):
    """Raise ValueError unless --gpus is "auto" or a positive number."""
    if gpus != "auto" and not (gpus.isdecimal() and int(gpus) > 0):
        raise ValueError(f"--gpus={gpus}: expected a positive number or auto")


def expand_paths(options):
    """Put the home folder in the place of "~" in every path."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata["path"] and isinstance(value, tuple):
            setattr(options, field.name, tuple(map(os.path.expanduser, value)))
        elif field.metadata["path"] and isinstance(value, str):
            setattr(options, field.name, ",".join(map(os.path.expanduser, value.split(","))))


def _check_number(name, value, written, kind, limits):
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name}={written}: expected a finite number")
    if limits["above"] is not None and value <= limits["above"]:
        positive = "a positive number" if limits["above"] == 0 else f"more than {limits['above']}"
        raise ValueError(f"--{name}={written}: expected {positive}")
    if value < limits["least"]:
        raise ValueError(f"--{name}={written}: expected {limits['least']} or more")
    most = MOST[kind] if limits["most"] is None else limits["most"]
    if value > most:
        raise ValueError(f"--{name}={written}: expected at most {most:g}")
