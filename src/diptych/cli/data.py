"""`diptych data TOOL`: what makes shards. inspection.py looks at them, selection.py chooses, negatives.py adds."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych.cli import inspection, negatives, selection
from diptych.cli.arguments import add_overwrite, add_settings, add_verb, configured


def add(verbs: Any) -> None:
    """Declares the verbs."""
    data = verbs.add_parser("data", help="make and inspect shards", description="Make and inspect shards.")
    tools = data.add_subparsers(metavar="TOOL", required=True)
    _add_pack(tools)
    inspection.add(tools)
    selection.add(tools)
    negatives.add(tools)
    _add_emoji(tools)


def _add_pack(tools: Any) -> None:
    pack = add_verb(
        tools,
        "pack",
        _pack,
        "write WebDataset shards from pictures, a table, or an img2dataset download; interrupted, it goes on",
        example="diptych data pack pictures/train.csv shards/train captions=[name,keywords] separator='\" | \"'",
        keys="diptych_data.packing.options:PackOptions",
    )
    pack.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of pictures, CSV, TSV, JSON lines, parquet, or img2dataset's output",
    )
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    add_settings(pack, "Options as key=value pairs; every key is listed below.")
    add_overwrite(pack, "a folder")


def _add_emoji(tools: Any) -> None:
    emoji = add_verb(
        tools,
        "emoji",
        _emoji,
        "write the bundled pictures (emoji by four artists) with their captions as a folder and CSV files",
        example="diptych data emoji pictures",
    )
    emoji.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    add_overwrite(emoji, "a folder")


def _pack(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.pack import PackOptions, pack

    given = {"source": str(options.source), "out": str(options.out), "overwrite": options.overwrite}
    return asdict(pack(configured(PackOptions, given, options.settings, where="diptych data pack")))


def _emoji(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.emoji import extract

    extract(options.out, overwrite=options.overwrite)
    return {"folder": str(options.out)}
