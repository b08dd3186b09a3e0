"""Whole numbers of an option: "64,128" or "64 128", each once, in ascending order."""

from __future__ import annotations

from collections.abc import Sequence

from hal_core import HalError

#: More digits than any length or batch has.
_MOST_DIGITS = 9


def whole_numbers(given: Sequence[str], option: str) -> list[int]:
    """The numbers of an option that may be repeated.

    Args:
        given: its values, each a list divided by commas. option: its name, for the message.

    Raises:
        HalError: a word that is no whole number of 1 or more.
    """
    words = [word.strip() for words in given for word in words.split(",") if word.strip()]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) <= _MOST_DIGITS and int(word) > 0):
            raise HalError(f"{option} {word[:40]!r} was given: pass whole numbers of 1 or more, divided by commas")
    if not words:
        raise HalError(f"{option} was given without a number: pass whole numbers of 1 or more, divided by commas")
    return sorted({int(word) for word in words})
