"""`diptych bench WHAT`: measurements of speed and memory. One `_add_…` and one verb for each WHAT."""

import argparse
import logging
from pathlib import Path
from typing import Any

from diptych.cli.arguments import add_settings, add_verb
from diptych.cli.outcome import Outcome
from diptych.errors import ConfigError

log = logging.getLogger(__name__)


def add(verbs: Any) -> None:
    """Declares the verbs."""
    bench = verbs.add_parser("bench", help="measure speed and memory", description="Measure speed and memory.")
    tools = bench.add_subparsers(metavar="WHAT", required=True)
    _add_loss(tools)
    _add_data(tools)
    _add_train(tools)
    _add_caption(tools)
    _add_eval(tools)
    _add_ranks(tools)


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


def _add_train(tools: Any) -> None:
    train = add_verb(
        tools,
        "train",
        _bench_train,
        "samples per second, MFU, memory and the parts of a step of the training loop, beside peers in the same run",
        example="diptych bench train --batch 64 --against bare,open_clip --peer-python .peer/bin/python",
    )
    add_settings(train, "settings of our recipe over the options, such as micro_batch=32")
    train.add_argument("--model", default="ViT-B-32", help="an open_clip name or JSON file (default: ViT-B-32)")
    train.add_argument("--batch", type=int, default=64, help="pairs in a step (default: 64)")
    train.add_argument("--steps", type=int, default=30, help="timed steps (default: 30)")
    train.add_argument("--warmup", type=int, default=5, help="steps before those (default: 5)")
    train.add_argument("--every", type=int, help="steps between logged lines, at which time is read (cpu 1, cuda 5)")
    train.add_argument("--rounds", type=int, default=3, help="processes per measurement, alternating (default: 3)")
    train.add_argument("--workers", type=int, default=2, help="loader processes, of everybody (default: 2)")
    train.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    train.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of everybody")
    train.add_argument(
        "--against",
        default="bare,open_clip-step",
        metavar="NAME[,NAME…]",
        help="bare: our model's step on one batch; open_clip-step: theirs; open_clip: their trainer; ours-saving: with "
        "a checkpoint (default: bare,open_clip-step)",
    )
    train.add_argument("--peer-python", type=Path, metavar="PATH", help="Python that has open_clip's trainer")
    train.add_argument("--patch-dropout", type=float, metavar="SHARE", help="of the image tower's patches")
    train.add_argument("--compile", action="store_true", help="torch.compile, of everybody")
    train.add_argument("--checkpoint-activations", action="store_true", help="computed again in backward, of everybody")
    train.add_argument("--picture", default="500x375", metavar="WxH", help="size of the JPEG files (default: 500x375)")
    train.add_argument("--split-steps", type=int, default=8, help="steps of the profiled run; 0: none (default: 8)")
    train.add_argument("--profile", type=Path, metavar="FILE", help="write the profiled run's Chrome trace there")
    train.add_argument("--work", type=Path, metavar="FOLDER", help="where some gigabytes are made, and removed again")


def _add_caption(tools: Any) -> None:
    caption = add_verb(
        tools,
        "caption",
        _bench_caption,
        "time and peak memory of the caption head beside a dense one; a captioner's step beside its parts run alone",
        example="diptych bench caption --batch 64 --rounds 1",
    )
    caption.add_argument("--batch", type=int, default=256, metavar="B", help="captions, of the head (default: 256)")
    caption.add_argument("--length", type=int, default=64, metavar="L", help="tokens of a caption (default: 64)")
    caption.add_argument("--width", type=int, default=512, metavar="W", help="of a token (default: 512)")
    caption.add_argument("--vocab", type=int, default=49408, metavar="V", help="words (default: 49408)")
    caption.add_argument("--model", default="coca_ViT-B-32", help="an open_clip captioner (default: coca_ViT-B-32)")
    caption.add_argument("--step-batch", type=int, default=8, metavar="B", help="pairs, of the step (default: 8)")
    caption.add_argument("--rounds", type=int, default=3, help="processes per measurement, alternating (default: 3)")
    caption.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _bench_caption(options: argparse.Namespace) -> Outcome:
    import torch

    from diptych.bench.caption import Plan, as_json, measure_all, table

    plan = Plan(
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch=options.batch,
        length=options.length,
        width=options.width,
        vocab=options.vocab,
        model=options.model,
        step_batch=options.step_batch,
        rounds=options.rounds,
    )
    report = measure_all(plan, progress=lambda text: log.info("%s", text))
    return Outcome(as_json(report), table(report))


def _add_eval(tools: Any) -> None:
    evaluate = add_verb(
        tools,
        "eval",
        _bench_eval,
        "zero-shot classification and retrieval of one set, start to results, beside clip-benchmark in the same run",
        example="diptych bench eval --model demo/run --peer-python .peer-eval/bin/python",
    )
    evaluate.add_argument(
        "--model", default="open_clip:ViT-B-32", help="what `diptych export` takes to open_clip (open_clip:ViT-B-32)"
    )
    evaluate.add_argument("--peer-python", type=Path, metavar="PATH", help="Python that has clip-benchmark")
    evaluate.add_argument(
        "--data", type=Path, metavar="FOLDER", help="in clip-benchmark's layout, with classes and captions; none: made"
    )
    evaluate.add_argument("--pictures", type=int, default=1000, help="of a set that is made (default: 1000)")
    evaluate.add_argument("--classes", type=int, default=20, help="of it, with 80 prompts each (default: 20)")
    evaluate.add_argument("--captions", type=int, default=5, help="of each picture of it (default: 5)")
    evaluate.add_argument("--picture", default="500x375", metavar="WxH", help="size of its pictures (default: 500x375)")
    evaluate.add_argument("--batch", type=int, default=64, help="of everybody (default: 64)")
    evaluate.add_argument("--workers", type=int, default=4, help="their loader's processes, our threads (default: 4)")
    evaluate.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of everybody; their default is bf16"
    )
    evaluate.add_argument("--rounds", type=int, default=3, help="processes per measurement, alternating (default: 3)")
    evaluate.add_argument("--work", type=Path, metavar="FOLDER", help="where model and set are written, and removed")


def _bench_eval(options: argparse.Namespace) -> Outcome:
    from diptych.bench.data_pictures import parse_sizes
    from diptych.bench.eval import Plan, measure_all
    from diptych.bench.eval_data import MadeSet
    from diptych.bench.eval_table import as_json, table

    plan = Plan(
        model=options.model,
        data=options.data,
        made=MadeSet(options.pictures, options.classes, options.captions, parse_sizes(options.picture)[0]),
        batch=options.batch,
        workers=options.workers,
        precision=options.precision,
        rounds=options.rounds,
        peer_python=options.peer_python,
    )
    report = measure_all(plan, progress=lambda text: log.info("%s", text), work=options.work)
    return Outcome(as_json(report), table(report))


def _add_ranks(tools: Any) -> None:
    ranks = add_verb(
        tools,
        "ranks",
        _bench_ranks,
        "seconds and memory of retrieval among N pictures and N texts, both ways",
        example="diptych bench ranks --rows 20000,50000 --widths 64,512",
    )
    ranks.add_argument("--rows", default="20000", metavar="N[,N…]", help="of each side (default: 20000)")
    ranks.add_argument("--widths", default="512", metavar="D[,D…]", help="of the features (default: 512)")
    dtypes = ["float32", "float16", "bfloat16"]
    ranks.add_argument("--dtype", choices=dtypes, default="float32", help="as which features are stored (float32)")
    ranks.add_argument(
        "--limit", type=float, default=600.0, metavar="SECONDS", help="of each; memory is known all the same (600)"
    )


def _bench_ranks(options: argparse.Namespace) -> Outcome:
    from diptych_eval.bench import Setting, as_json, measure_all, table

    sizes = _numbers(options.rows, "--rows")
    settings = [
        Setting(rows, width, options.dtype, options.limit)
        for width in _numbers(options.widths, "--widths")
        for rows in sizes
    ]
    rows = measure_all(settings, progress=lambda text: log.info("%s", text))
    return Outcome({"rows": as_json(rows)}, table(rows))


def _bench_train(options: argparse.Namespace) -> Outcome:
    from diptych.bench.train import as_json, measure_all
    from diptych.bench.train_table import table

    report = measure_all(_plan_of_training(options), progress=lambda text: log.info("%s", text))
    return Outcome(as_json(report), table(report))


def _plan_of_training(options: argparse.Namespace) -> Any:
    import torch

    from diptych.bench.data_pictures import parse_sizes
    from diptych.bench.train_plan import Plan

    on_gpu = options.device == "cuda" or (options.device is None and torch.cuda.is_available())
    return Plan(
        device="cuda" if on_gpu else "cpu",
        every=options.every if options.every is not None else 5 if on_gpu else 1,
        model=options.model,
        batch=options.batch,
        steps=options.steps,
        warmup=options.warmup,
        rounds=options.rounds,
        workers=options.workers,
        precision=options.precision,
        against=tuple(name for name in options.against.split(",") if name),
        peer_python=options.peer_python,
        patch_dropout=options.patch_dropout,
        compile=options.compile,
        checkpoint_activations=options.checkpoint_activations,
        picture=parse_sizes(options.picture)[0],
        split_steps=options.split_steps,
        profile=options.profile,
        work=options.work,
        settings=tuple(options.settings),
    )


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
    sizes = _numbers(options.rows, "--rows")
    rows = measure_all(setting, sizes, names, rounds=options.rounds, progress=lambda text: log.info("%s", text))
    if options.json:
        return {"rows": as_json(rows)}
    print(table(rows, setting, peer=names[1] if len(names) > 1 else "ours"))
    return None


def _numbers(text: str, option: str) -> list[int]:
    """Positive numbers between commas."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{text!r} are no positive numbers · {option} · write them as 8192,16384")
    return [int(part) for part in parts]
