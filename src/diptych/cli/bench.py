"""`diptych bench WHAT`: measurements of speed and memory. One `_add_…` and one verb for each WHAT."""

import argparse
import logging
from pathlib import Path
from typing import Any

from diptych.cli.arguments import add_verb
from diptych.cli.outcome import Outcome
from diptych.errors import ConfigError

log = logging.getLogger(__name__)


def add(verbs: Any) -> None:
    """Declares the verbs."""
    bench = verbs.add_parser("bench", help="measure speed and memory", description="Measure speed and memory.")
    tools = bench.add_subparsers(metavar="WHAT", required=True)
    _add_loss(tools)
    _add_data(tools)


def _add_loss(tools: Any) -> None:
    loss = add_verb(
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


def _add_data(tools: Any) -> None:
    data = add_verb(
        tools,
        "data",
        _bench_data,
        "pictures per second and core from shards to batches, memory, start-up, resuming, captions per second",
        example="diptych bench data --peer-python .peer/bin/python",
    )
    data.add_argument(
        "--peer-python", type=Path, metavar="PATH", help="Python of an environment with open_clip's trainer"
    )
    data.add_argument(
        "--measures",
        default="throughput,memory,startup,resume,tokens",
        metavar="NAME[,NAME…]",
        help="what to measure (default: throughput,memory,startup,resume,tokens); decoders: ways to decode and resize",
    )
    data.add_argument(
        "--sizes", default="500x375,1024x768", metavar="WxH[,WxH…]", help="pictures (default: 500x375,1024x768)"
    )
    data.add_argument("--side", type=int, default=224, metavar="PIXELS", help="of the views (default: 224)")
    data.add_argument("--shards", type=int, default=10_000, help="of start-up and resuming (default: 10000)")
    data.add_argument("--rounds", type=int, default=3, help="processes per measurement, alternating (default: 3)")
    data.add_argument("--work", type=Path, metavar="FOLDER", help="where a gigabyte of data is made, and removed again")


def _bench_data(options: argparse.Namespace) -> Outcome:
    from diptych.bench.data import Plan, as_json, measure_all, table
    from diptych.bench.data_pictures import parse_sizes

    plan = Plan(
        sizes=parse_sizes(options.sizes),
        measures=options.measures.split(","),
        rounds=options.rounds,
        side=options.side,
        shards=options.shards,
        peer_python=options.peer_python,
    )
    report = measure_all(plan, progress=lambda text: log.info("%s", text), work=options.work)
    return Outcome(as_json(report), table(report))


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
