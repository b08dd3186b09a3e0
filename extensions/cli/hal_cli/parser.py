"""The command-line parser of `hal`: every command takes `--json`, whichever plugin added it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hal_core.plugin_api import ContractError


class CommandParser(argparse.ArgumentParser):
    """A parser whose subcommands are parsers of this class too, because argparse builds them from their parent's."""

    def commands(self) -> Iterator[CommandParser]:
        """The parsers below this one that run something, at any depth."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        for parser in (parser for group in groups for parser in group.choices.values()):
            if parser.get_default("run") is not None:
                yield parser
            yield from parser.commands()

    def complete(self) -> None:
        """Give every command `--json`, and its name as `command`. Called once all commands have been added."""
        for parser in self.commands():
            parser.set_defaults(command=parser.prog)
            if "--json" not in parser._option_string_actions:
                parser.add_argument("--json", action="store_true", help="print JSON")


def whole_numbers(text: str, count: int, option: str, wanted: str) -> list[int]:
    """The whole numbers of "1,8,64".

    Args:
        text: what was given. count: how many numbers are wanted; 0 for one or more.
        option, wanted: the option's name and its form, for the message.

    Raises:
        ContractError: not `count` numbers of 0 or more.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if (count and len(numbers) != count) or not numbers or min(numbers) < 0:
        raise ContractError(f"{option} {text!r} was given: pass {wanted} as whole numbers")
    return numbers
