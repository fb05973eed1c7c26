"""What the report shows of each task, kept beside results.json: it can be drawn again without model and data.

exhibits/SLUG.json    queries, confusions, points and descriptions, their pictures as data URIs
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_eval import gallery
from diptych_eval.gallery import Confusion, Description, Guess, Point, Query
from diptych_eval.items import slug
from diptych_eval.result import Result
from diptych_eval.tasks.family import Matches, Outcome

_IMAGE_QUERIES, _TEXT_QUERIES, _CONFUSIONS, _DESCRIPTIONS = 12, 6, 12, 12


@dataclass(frozen=True)
class Exhibit:
    """One task's pictures."""

    image_queries: tuple[Query, ...] = ()
    text_queries: tuple[Query, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    points: tuple[Point, ...] = ()
    descriptions: tuple[Description, ...] = ()


def write(folder: Path, result: Result, outcome: Outcome) -> None:
    """Chooses, and replaces the file of one task; nothing where there is nothing to show."""
    if outcome.matches is not None:
        exhibit = _of_matches(outcome.matches)
    elif outcome.descriptions is not None:
        exhibit = Exhibit(descriptions=gallery.descriptions(outcome.descriptions, _DESCRIPTIONS))
    else:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{slug(result)}.json", json.dumps(asdict(exhibit), ensure_ascii=False))


def _of_matches(matches: Matches) -> Exhibit:
    classes = matches.text_ranks is None  # captions are not confused with each other as classes are
    return Exhibit(
        gallery.image_queries(matches, _IMAGE_QUERIES) if classes else (),
        gallery.text_queries(matches, _TEXT_QUERIES),
        gallery.worst_confusions(matches, _CONFUSIONS) if classes else (),
        gallery.embedding_map(matches),
    )


def read(folder: Path, result: Result) -> Exhibit | None:
    """Those of one task; None where there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / f"{slug(result)}.json"
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Exhibit(
            tuple(map(_query, tree["image_queries"])),
            tuple(map(_query, tree["text_queries"])),
            tuple(Confusion(**one) for one in tree["confusions"]),
            tuple(Point(one["group"], tuple(one["image"]), tuple(one["text"])) for one in tree["points"]),
            tuple(
                Description(**(one | {"references": tuple(one["references"])})) for one in tree.get("descriptions", ())
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged exhibits ({error}) · {path} · evaluate again with --overwrite") from error


def _query(tree: dict[str, Any]) -> Query:
    return Query(tree["text"], tree["picture"], tree["rank"], tuple(Guess(**one) for one in tree["guesses"]))
