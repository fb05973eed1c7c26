"""The text of docs/config.md: every key of every configured command, from the dataclasses themselves."""

from collections.abc import Iterator

from diptych.config import Config, Entry, describe
from diptych.train.recipe import Recipe
from diptych_data.pack import PackOptions
from diptych_eval.suite import EvalConfig

HEAD = """# Configuration

<!-- Generated from the dataclasses; `pytest tests/test_documents.py --update-golden` writes it anew. -->

A run is one YAML file; a file says only what differs from the defaults below. On the command line `section.key=value`
overrides the file, and values are YAML too: `optim.peak_lr=3e-4`, `data.captions.views=[{columns: [name]}]`. A number
in the path is a position in a list: `tasks.0.root=shards/test`. `extends: other.yaml` starts from another file: maps
are merged, lists replaced. An unknown key is an error that names the nearest valid one. `<name>` in a key stands for
`type: name`: the keys below it belong to that choice. The same text is printed by `--help`.
"""
SECTIONS: tuple[tuple[str, type[Config]], ...] = (
    ("diptych train", Recipe),
    ("diptych eval", EvalConfig),
    ("diptych data pack", PackOptions),
)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, config in SECTIONS:
        parts.append(f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts += _lines(describe(config))
    return "".join(parts)


def _lines(entries: Iterator[Entry]) -> Iterator[str]:
    for entry in entries:
        default = f"`{entry.default}`" if entry.default else ""
        cells = [f"`{entry.key}`", entry.type, default, entry.doc]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
