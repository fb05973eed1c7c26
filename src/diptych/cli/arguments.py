"""What verbs share: how they are declared, and the help that lists the keys of a configuration."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from diptych.cli.outcome import Outcome
from diptych.config import C, Config, apply_override, describe, from_tree

Verb = Callable[[argparse.Namespace], Outcome | dict[str, Any] | None]
MODEL_HELP = "run folder, open_clip:NAME[:TAG or file], hf:NAME, or a folder of open_clip or transformers"
_RUN_HELP = "Settings are key=value pairs over the YAML file; every key is listed below."


def add_verb(verbs: Any, name: str, call: Verb, help: str, *, example: str, keys: str | None = None) -> Any:
    """Declares a verb; returns its parser.

    Args:
        keys: `module:Class` of the configuration that its `key=value` settings fill; `--help` lists it.
    """
    parser = verbs.add_parser(name, help=help, description=help, epilog=f"example: {example}", add_help=keys is None)
    if keys is not None:
        parser.add_argument("-h", "--help", action=_KeysHelp, source=keys)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    parser.set_defaults(verb=call)
    return parser


def add_settings(parser: Any, help: str = _RUN_HELP) -> None:
    """Lets a verb take `key=value` settings."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help=help)


def add_overwrite(parser: Any, what: str) -> None:
    """Lets a verb replace what is there."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} that is already there")


def configured(cls: type[C], given: dict[str, Any], settings: Sequence[str], *, where: str) -> C:
    """The configuration of a verb that has no YAML file: what its arguments say, and its settings over that.

    Raises:
        ConfigError: a setting is wrong.
    """
    tree = dict(given)
    for setting in settings:
        apply_override(tree, setting)
    return from_tree(cls, tree, where=where)


class _KeysHelp(argparse.Action):
    """`--help` of a configured verb: usage, then every key with type, default and meaning."""

    def __init__(self, option_strings: Sequence[str], dest: str, source: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this, with every key")
        self._source = source

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints and exits."""
        parser.print_help()
        print("\nkeys:")
        for entry in describe(_config_class(self._source)):
            default = f" = {entry.default}" if entry.default else ""
            print(f"  {entry.key}{default}\n      {entry.type}. {entry.doc}")
        parser.exit()


def _config_class(source: str) -> type[Config]:
    import importlib

    module, _, name = source.partition(":")
    return getattr(importlib.import_module(module), name)
