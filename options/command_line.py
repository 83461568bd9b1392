"""Reading options from the command line."""

import contextlib
import dataclasses
import difflib

from options.help import print_help

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_options(argv, options, intro):
    """Read command-line words into `options`, a dataclass derived from `options.fields.Options`.

    `--help` prints `intro` and the options, and exits. Raises ValueError, in one line, for wrong words.
    """
    if asks_for_help(argv):
        print_help(options, intro)
        raise SystemExit(0)
    return options(**read_words(argv, options))


def asks_for_help(argv):
    return not {"-h", "--help"}.isdisjoint(argv)


def nearest(word, words, prefix=""):
    """The text "; did you mean …?" if one of `words` is similar, else an empty text."""
    by_lower = {w.lower(): w for w in words}
    match = difflib.get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {prefix}{by_lower[match[0]]}?" if match else ""


def read_words(argv, options, extra=(), gone=None):
    """The values that `--name=value`, `--name value` and `--name` set, {name: value}; later words win.

    options: a dataclass whose fields a `Section` declares. extra: further names, whose values are text. gone:
    former names, and what to write instead.

    Raises ValueError, in one line, for unknown names and for values of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    values, words = {}, list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in (gone or {}):
            raise ValueError(f"--{name} is gone; write {gone[name]}")
        if not word.startswith("--") or (name not in fields and name not in extra):
            raise ValueError(f"unknown option {word.partition('=')[0]}{nearest(name, fields, '--')}")
        if not equals:
            text = _value_after(name, fields.get(name), words)
        values[name] = _convert(fields[name], text) if name in fields else text
    return values


def _value_after(name, field, words):
    """The value of an option without "=": the next word, removed from `words`, or "true" for a switch."""
    has_value = bool(words) and not words[0].startswith("--")
    kind = field.type if field else str
    if kind in (bool, bool | str) and not (has_value and (kind is not bool or words[0].lower() in BOOLS)):
        return "true"
    if has_value:
        return words.pop(0)
    if field and field.metadata["bare"] is not None:
        return "true"
    raise ValueError(f"--{name} needs a value: --{name}={getattr(kind, '__name__', 'VALUE')}")


def _convert(field, text):
    """The text of an option as a value of its field's type."""
    name, kind, bare = field.name, field.type, field.metadata["bare"]
    if kind in (bool, bool | str):
        if text.lower() in BOOLS:
            return BOOLS[text.lower()]
        if kind is bool:
            raise ValueError(f"--{name}={text}: expected true or false")
        return text
    if bare is not None and text.lower() in ("true", "false"):
        return bare if text.lower() == "true" else kind()
    if kind is tuple:
        words = [word for word in text.split(",") if word]
        return tuple(words if field.metadata["items"] is str else (_number(name, word) for word in words))
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text}: expected {kind.__name__}, got {text!r}") from None


def _number(name, word):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    raise ValueError(f"--{name}: expected numbers divided by commas, got {word!r}")
