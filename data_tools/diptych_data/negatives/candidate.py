"""What writers propose and shards keep."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Negative:
    """A caption that is not true of its picture."""

    text: str
    how: str
    """The rule: replace, swap, add, order; or the language model's way."""
    type: str
    """What was changed: object, colour, tone, gender, count, direction, relation, action, attribute, order."""
    of: str
    """The true caption from which it was made."""

    @property
    def kind(self) -> str:
        """What balance, limits and the blind test count by."""
        return f"{self.how} {self.type}"

    def document(self) -> dict[str, Any]:
        """As it stands in the sample's JSON."""
        return dict(vars(self))
