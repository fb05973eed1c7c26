"""Beginnings of parameters' names, as people write them in settings: `image_tower`, `text_tower.transformer`."""

import difflib
from collections.abc import Iterable, Sequence

from diptych.errors import ConfigError


def begins(name: str, prefix: str) -> bool:
    """Whether `prefix` is a name's beginning, whole parts of it."""
    return name == prefix or name.startswith(f"{prefix}.")


def check(prefixes: Iterable[str], names: Sequence[str], *, where: str) -> None:
    """Raises ConfigError for a prefix that begins no name, with the nearest that does."""
    for prefix in prefixes:
        if not any(begins(name, prefix) for name in names):
            known = sorted({".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)})
            close = difflib.get_close_matches(prefix, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known[:6])} ..."
            raise ConfigError(f"no parameter's name begins with {prefix!r} · {where} · {hint}")
