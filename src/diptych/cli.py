"""The `diptych` command: verbs, and the one place that wires the packages together. Verbs import what they need."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych import log as logs
from diptych.config import Config, describe
from diptych.errors import ConfigError, DiptychError
from diptych.version import __version__

log = logging.getLogger(__name__)

OK, INTERNAL, BAD_INPUT = 0, 1, 2
_RUN_HELP = "Settings are key=value pairs over the YAML file; every key is listed below."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 2 bad input (one line on stderr), traceback for a bug."""
    options = _parse(arguments)
    logs.setup(quiet=options.quiet, rank=int(os.environ.get("RANK", "0")))
    try:
        result = options.verb(options)
    except DiptychError as error:
        print(f"diptych: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("diptych: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    if result is not None:
        _show(result, as_json=options.json)
    return OK


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; settings may stand before, between and behind flags, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(options, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.settings = [*options.settings, *rest]
    return options


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        print(f"{name}: {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_readable(inner)}" for name, inner in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# --- verbs -------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.config import load
    from diptych.distributed.runtime import launched_ranks
    from diptych.runfolder import RunFolder
    from diptych.train.loop import train
    from diptych.train.recipe import Recipe

    recipe = load(Recipe, options.config, options.settings)
    if options.overwrite and launched_ranks().is_main:
        RunFolder(recipe.run).remove()
    run = train(recipe, _evaluator(recipe.evaluate.config))
    return {"run": str(run.root), "samples_seen": recipe.total_steps * recipe.global_batch}


def _evaluator(config: Path | None) -> Any:
    """What the loop calls to measure a model while it trains; it knows nothing of the evaluation package."""
    if config is None:
        return None
    from diptych.config import load
    from diptych.models.dual_encoder import DualEncoder
    from diptych_eval.load import ModelEncoder
    from diptych_eval.suite import EvalConfig, evaluate

    tasks = load(EvalConfig, config)

    def measure(model: DualEncoder) -> dict[str, float]:
        results = evaluate(ModelEncoder(model), tasks)
        return {f"{result.dataset}/{name}": value for result in results for name, value in result.metrics.items()}

    return measure


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.config import load as load_config
    from diptych.runfolder import RunFolder
    from diptych_eval.load import load
    from diptych_eval.report.html import write_report
    from diptych_eval.suite import EvalConfig, evaluate

    tasks = load_config(EvalConfig, options.config, options.settings)
    run = RunFolder(Path(options.model))
    folder = options.out or (run.evaluation if run.exists else Path("eval") / options.model.replace("/", "_"))
    results = evaluate(load(options.model), tasks, out=folder, overwrite=options.overwrite)
    summary: dict[str, Any] = {f"{result.task} {result.dataset}": result.metrics for result in results}
    if run.exists:
        write_report(run.root, run.report)
        summary["report"] = str(run.report)
    return summary


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.runfolder import RunFolder
    from diptych_eval.report.html import write_report

    run = RunFolder(options.run)
    out = options.out or run.report
    write_report(run.root, out)
    return {"report": str(out)}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.export.to_open_clip import export
    from diptych_eval.load import load

    return {"folder": str(export(load(options.model).model, options.out, overwrite=options.overwrite))}


def _pack(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from diptych.config import apply_override, from_tree
    from diptych_data.pack import PackOptions, pack

    tree: dict[str, Any] = {"source": str(options.source), "out": str(options.out), "overwrite": options.overwrite}
    for setting in options.settings:
        apply_override(tree, setting)
    summary = pack(from_tree(PackOptions, tree, where="diptych data pack"))
    return asdict(summary)


def _index(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.index import index_shards

    return {"shards": len(index_shards(options.folder))}


def _emoji(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.emoji import extract

    extract(options.out, overwrite=options.overwrite)
    return {"folder": str(options.out)}


def _bench_loss(options: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    from diptych.bench.loss import Setting, as_json, measure_all, table

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting("ours", 0, options.width, device, options.dtype, options.repeats)
    names = ["ours", *dict.fromkeys(name for name in options.against.split(",") if name)]
    sizes = _sizes(options.rows)
    rows = measure_all(setting, sizes, names, rounds=options.rounds, progress=lambda text: log.info("%s", text))
    if options.json:
        return {"rows": as_json(rows)}
    print(table(rows, setting, peer=names[1] if len(names) > 1 else "ours"))
    return None


def _sizes(text: str) -> list[int]:
    """Positive numbers between commas."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"batch sizes {text!r} are no positive numbers · --rows · write them as 8192,16384")
    return [int(part) for part in parts]


# --- arguments ---------------------------------------------------------------------------------------------------


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych",
        description="Pretrain, fine-tune and evaluate CLIP-style vision-language models.",
        epilog="example: diptych train configs/pretrain/emoji.yaml total_samples=20000",
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_train(verbs)
    _add_eval(verbs)
    _add_export(verbs)
    _add_data(verbs)
    _add_bench(verbs)
    return parser


def _verb(verbs: Any, name: str, call: Any, help: str, *, example: str, keys: str | None = None) -> Any:
    parser = verbs.add_parser(name, help=help, description=help, epilog=f"example: {example}", add_help=keys is None)
    if keys is not None:
        parser.add_argument("-h", "--help", action=_KeysHelp, source=keys)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    parser.set_defaults(verb=call)
    return parser


def _settings(parser: Any) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help=_RUN_HELP)


def _overwrite(parser: Any, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} that is already there")


def _add_train(verbs: Any) -> None:
    train = _verb(
        verbs,
        "train",
        _train,
        "pretrain a dual encoder; the same command again resumes",
        example="diptych train configs/pretrain/emoji.yaml run=runs/first seed=1",
        keys="diptych.train.recipe:Recipe",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    _settings(train)
    _overwrite(train, "a run")


def _add_eval(verbs: Any) -> None:
    evaluate = _verb(
        verbs,
        "eval",
        _eval,
        "measure a model: zero-shot classification, retrieval; writes results.json, for a run also report.html",
        example="diptych eval runs/first --config configs/eval/emoji.yaml",
        keys="diptych_eval.suite:EvalConfig",
    )
    evaluate.add_argument("model", metavar="MODEL", help="run folder, or open_clip:NAME[:TAG]")
    evaluate.add_argument("--config", type=Path, required=True, help="YAML file of tasks")
    evaluate.add_argument("--out", type=Path, help="folder for results (default: RUN/eval)")
    _settings(evaluate)
    _overwrite(evaluate, "results")
    report = _verb(verbs, "report", _report, "draw the HTML report of a run again", example="diptych report runs/first")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, help="HTML file (default: RUN/report.html)")


def _add_export(verbs: Any) -> None:
    export = _verb(
        verbs,
        "export",
        _export,
        "write a model in another library's form",
        example="diptych export runs/first exported --to open_clip",
    )
    export.add_argument("model", metavar="MODEL", help="run folder, or open_clip:NAME[:TAG]")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument("--to", choices=["open_clip"], default="open_clip", help="the library that will open it")
    _overwrite(export, "an export")


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="make and inspect shards", description="Make and inspect shards.")
    tools = data.add_subparsers(metavar="TOOL", required=True)
    pack = _verb(
        tools,
        "pack",
        _pack,
        "write WebDataset shards from a folder of pictures or a table",
        example="diptych data pack pictures/train.csv shards/train captions=[name,keywords] separator=' | '",
        keys="diptych_data.pack:PackOptions",
    )
    pack.add_argument("source", type=Path, metavar="SOURCE", help="folder of pictures, or CSV/TSV file")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    _settings(pack)
    _overwrite(pack, "a folder")
    index = _verb(
        tools, "index", _index, "write the sidecar index of every shard", example="diptych data index shards/train"
    )
    index.add_argument("folder", type=Path, metavar="FOLDER", help="folder of shards")
    emoji = _verb(
        tools,
        "emoji",
        _emoji,
        "write the bundled pictures (emoji by four artists) with their captions as a folder and CSV files",
        example="diptych data emoji pictures",
    )
    emoji.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    _overwrite(emoji, "a folder")


def _add_bench(verbs: Any) -> None:
    bench = verbs.add_parser("bench", help="measure speed and memory", description="Measure speed and memory.")
    tools = bench.add_subparsers(metavar="WHAT", required=True)
    loss = _verb(
        tools,
        "loss",
        _bench_loss,
        "time and peak memory of the contrastive loss, forward and backward, beside peers in the same run",
        example="diptych bench loss --rows 8192,16384 --against open_clip,chunked",
    )
    loss.add_argument("--rows", default="8192", metavar="B[,B…]", help="batch sizes (default: 8192)")
    loss.add_argument("--width", type=int, default=512, metavar="D", help="embed_dim (default: 512)")
    loss.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the features")
    loss.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    loss.add_argument(
        "--against",
        default="open_clip",
        metavar="NAME[,NAME…]",
        help="open_clip, open_clip-compiled, open_clip-sigmoid, chunked, ours-sigmoid, ours-plugs (default: open_clip)",
    )
    loss.add_argument("--rounds", type=int, default=3, help="processes per measurement, alternating (default: 3)")
    loss.add_argument("--repeats", type=int, default=1, help="passes in a process; their median counts (default: 1)")


if __name__ == "__main__":
    sys.exit(main())
