"""The text of `--help` and of docs/config.md."""

import dataclasses
import textwrap

WIDTH = 110  # columns of --help


def written(value):
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def sections(options, program=None):
    """{section: its fields}, in the order of the dataclass; only those of `program` if it is given."""
    found = {}
    for field in dataclasses.fields(options):
        if program is None or program in field.metadata["programs"]:
            found.setdefault(field.metadata["section"], []).append(field)
    return found


def print_help(options, intro, program=None, presets=()):
    """Print options with their defaults by section, aligned; only those of `program` if it is given."""
    print(intro.strip())
    if presets:
        print(f"\nPresets: {', '.join(presets)}")
    groups = sections(options, program)
    column = 2 + max(len(_left(field)) for fields in groups.values() for field in fields)
    column = min(column, 32)
    for section, fields in groups.items():
        print(f"\n{section.name}: {section.meaning}")
        for field in fields:
            lines = textwrap.wrap(field.metadata["meaning"], WIDTH - column - 2)
            left = f"  {_left(field)}"
            if len(left) > column:
                print(left)
            else:
                lines[0] = left.ljust(column + 2) + lines[0]
            for k, line in enumerate(lines):
                print(line if k == 0 and len(left) <= column else " " * (column + 2) + line)


def _left(field):
    return f"--{field.name}={written(field.default)}"


def markdown(options, presets, architectures):
    """The text of docs/config.md: a table for each section, then what presets and architectures set."""
    lines = [
        "# Options",
        "",
        "Written by `python cfg.py > docs/config.md`: do not edit it here. Set options in `cfg.py`, or on",
        "the command line as `--name=value`; sequences are written with commas, a bare `--name` switches on.",
    ]
    for section, fields in sections(options).items():
        lines += ["", f"## {section.name.capitalize()}: {section.meaning}", ""]
        lines += ["| option | default | meaning | programs |", "|---|---|---|---|"]
        for field in fields:
            default = f"`{written(field.default)}`" if written(field.default) else "none"
            programs = ", ".join(field.metadata["programs"])
            lines.append(f"| `--{field.name}` | {default} | {field.metadata['meaning']} | {programs} |")
    for title, table in (("preset", presets), ("arch", architectures)):
        lines += ["", f"## What each `--{title}` sets", "", f"| {title} | options |", "|---|---|"]
        for name, values in table.items():
            words = " ".join(f"`--{key}={written(value)}`" for key, value in values.items())
            lines.append(f"| `{name}` | {words or 'the defaults'} |")
    return "\n".join(lines) + "\n"
