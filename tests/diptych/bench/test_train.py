"""The benchmark of training measures what it says, with a model that takes no time."""

import dataclasses
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.bench import train, train_flops, train_ours, train_peer
from diptych.bench.train import as_json, measure_all
from diptych.bench.train_ours import MEASURES
from diptych.bench.train_peer import Clock, Request, run_steps, timed, trainer_arguments
from diptych.bench.train_plan import IMPLEMENTATIONS, PEER, Plan
from diptych.bench.train_rows import Report, Row, Saving, row, saving
from diptych.bench.train_split import Split, split
from diptych.bench.train_table import table
from diptych.cli import main
from diptych.cli.bench import _plan_of_training
from diptych.cli.program import parse
from diptych.config import from_tree
from diptych.errors import ConfigError, DiptychError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.testing import TINY_MODEL

IN_PLACE = ("checkpoint.asynchronous=false",)  # or whether it is complete in time would be a matter of luck
FACTS = {
    "precision": "bf16",
    "device_name": "",
    "threads": 2,
    "parameters": 1_500_000,
    "image_size": 16,
    "tokens": 40,
    "flops_per_sample": 2e9,
    "padded_tokens": 77,
    "padded_flops_per_sample": 3e9,
    "peak_flops": 1e12,
    "peak_is_published": False,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Eight steps of four pairs, the first two to warm up, time read every two."""
    towers = TINY_MODEL["towers"]
    model = tmp_path_factory.mktemp("model") / "tiny.json"
    tree = {"embed_dim": towers["embed_dim"], "vision_cfg": towers["vision"], "text_cfg": towers["text"]}
    model.write_text(json.dumps(tree))
    return Plan(
        device="cpu",
        every=2,
        model=str(model),
        batch=4,
        steps=6,
        warmup=2,
        rounds=1,
        workers=0,
        precision="fp32",
        picture=(40, 32),
        settings=IN_PLACE,
    )


@pytest.fixture(scope="module")
def prepared(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("prepared")
    request = train._prepared(plan, folder, lambda _: None)
    return dataclasses.replace(request, model=plan.model, precision="fp32")


@pytest.fixture
def asked(prepared: Request, tmp_path: Path) -> Request:
    """With a folder of its own, as every process has one."""
    return dataclasses.replace(prepared, folder=str(tmp_path))


# --- operations ----------------------------------------------------------------------------------------------------


def by_hand(image_tokens: int, text_tokens: int) -> int:
    """Operations of a pair in the tiny model: one layer of width 32 in each tower, a shared space of 16."""

    def layer(tokens: int) -> int:
        matrices = 12 * tokens * 32**2  # three for attention, its output, two of the MLP that are four times as large
        return matrices + 2 * tokens**2 * 32

    forward = layer(image_tokens) + layer(text_tokens) + 2 * 32 * 16
    patches = 4 * 3 * 8**2 * 32
    return 2 * (3 * forward + 2 * patches)  # nobody needs the gradient of the pixels


@pytest.mark.parametrize("text_tokens", [16, 9])
def test_operations_are_those_counted_by_hand(text_tokens: int) -> None:
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0).train()
    images, tokens = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.ones(3, text_tokens, dtype=torch.long)
    assert train_flops.per_sample(model, images, tokens) == by_hand(5, text_tokens)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_patches_that_are_dropped_are_not_counted() -> None:
    towers = TINY_MODEL["towers"]
    changed = towers | {"vision": towers["vision"] | {"patch_dropout": 0.5}}
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": changed}), seed=0).train()
    images, tokens = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.ones(2, 16, dtype=torch.long)
    assert train_flops.per_sample(model, images, tokens) == by_hand(3, 16)


def test_gradients_that_nobody_needs_are_not_counted() -> None:
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"frozen": ["text_tower"]}), seed=0).train()
    images, tokens = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.ones(2, 16, dtype=torch.long)
    text_backward = 4 * (12 * 16 * 32**2 + 2 * 16**2 * 32 + 32 * 16)
    assert train_flops.per_sample(model, images, tokens) == by_hand(5, 16) - text_backward


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_devices_are_told_by_whole_words(name: str, peak: float | None) -> None:
    assert train_flops.published_peak(name) == peak


def test_a_processor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_flops, "_REPEATS", 2)
    assert 1e9 < train_flops.measured_peak("cpu", torch.float32) < 1e15


# --- one process ---------------------------------------------------------------------------------------------------


def test_the_loop_is_timed_by_what_it_logs(asked: Request) -> None:
    answer = MEASURES["ours"](asked)
    assert [window[:2] for window in answer["windows"]] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    assert all(seconds > 0 for _, _, seconds in answer["windows"])
    assert answer["peak_bytes"] > 50 * 2**20


def test_a_checkpoint_is_made_on_the_way(asked: Request) -> None:
    answer = MEASURES["ours-saving"](asked)
    assert asked.save_at == 6
    assert len(answer["windows"]) == 4
    assert 0 < answer["written_before_end"] < answer["windows"][-1][2] + 1  # within the window that it begins


def test_a_checkpoint_that_is_not_complete_in_time_is_no_measurement(asked: Request) -> None:
    with pytest.raises(DiptychError, match=r"not complete before the last step · bench train --steps · give more"):
        train_ours._train(asked, save_at=9)


@pytest.mark.parametrize("name", ["bare", "open_clip-step"])
def test_a_step_alone_is_timed_likewise(asked: Request, name: str) -> None:
    answer = MEASURES[name](dataclasses.replace(asked, checkpoint_activations=True))
    assert [window[:2] for window in answer["windows"]] == [(0, 2), (2, 2), (4, 2), (6, 2)]


def test_a_mark_stands_behind_every_so_many_steps(asked: Request) -> None:
    made: list[int] = []
    marks = list(run_steps(lambda: made.append(len(made)), dataclasses.replace(asked, steps=7, every=3)))
    assert [steps for steps, _ in marks] == [0, 3, 6]
    assert len(made) == 7
    assert timed([(1, 2.0), (4, 2.5), (5, 2.75)], asked)["windows"] == [(1, 3, 0.5), (4, 1, 0.25)]


def test_what_is_known_beforehand(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_flops, "_REPEATS", 1)
    facts = MEASURES["facts"](asked)
    assert facts["precision"] == "fp32"
    assert (facts["image_size"], facts["padded_tokens"]) == (16, 16)
    assert facts["flops_per_sample"] == by_hand(5, facts["tokens"])
    assert facts["padded_flops_per_sample"] == by_hand(5, 16)
    assert facts["open_clip_config"]["embed_dim"] == 16
    assert not facts["peak_is_published"]


def test_open_clips_trainer_is_asked_for_the_same(asked: Request) -> None:
    arguments = trainer_arguments(dataclasses.replace(asked, precision="bf16", compile=True, clip=1.0))
    values = dict(zip(arguments[:-1:2], arguments[1::2], strict=True))
    assert values["--train-data"] == asked.shards
    assert (values["--batch-size"], values["--train-num-samples"]) == ("4", "32")
    assert (values["--model"], values["--precision"], values["--grad-clip-norm"]) == ("tiny", "amp_bf16", "1.0")
    assert (values["--device"], values["--workers"], values["--log-every-n-steps"]) == ("cpu", "0", "2")
    assert arguments[-1] == "--torchcompile"
    assert "--grad-clip-norm" not in trainer_arguments(dataclasses.replace(asked, clip=None))


def test_its_logged_lines_are_marks() -> None:
    marks = Clock(64)
    for text in ("Start epoch 0", "Train Epoch: 0 [  64/1920 (3%)] Data (t): 0.1", "Train Epoch: 0 [1920/1920 (100%)]"):
        marks.handle(logging.LogRecord("root", logging.INFO, "", 0, text, None, None))
    assert [steps for steps, _ in marks.marks] == [1, 30]


def test_the_peers_file_runs_alone() -> None:
    source = Path(train_peer.__file__).read_text(encoding="utf-8")
    assert "import diptych" not in source
    assert "from diptych" not in source
    assert set(IMPLEMENTATIONS) - {PEER} <= set(MEASURES)


def test_a_step_of_the_loop_is_split(asked: Request) -> None:
    found = MEASURES["split"](dataclasses.replace(asked, steps=6, every=1))["split"]
    assert found["steps"] == 2
    assert found["host_ms"].keys() > {"data_wait", "forward", "loss", "backward", "optimizer", "rest"}
    assert sum(found["host_ms"].values()) == pytest.approx(found["wall_ms"])
    assert all(milliseconds > 0 for milliseconds in found["host_ms"].values())
    assert (Path(asked.folder) / "trace.json").is_file()


# --- the split -----------------------------------------------------------------------------------------------------


def event(name: str, start: float, length: float, **others: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": length, "tid": 7} | others


def a_step(start: float) -> list[dict[str, Any]]:
    """Ten milliseconds, of which two are nobody's."""
    return [
        event("diptych.data_wait", start, 1000),
        event("diptych.forward", start + 1000, 2000),
        event("diptych.loss", start + 3000, 1000),
        event("diptych.forward", start + 3200, 300),  # within the loss
        event("diptych.backward", start + 4000, 4000),
        event("diptych.forward", start, 9000, tid=8),  # another thread's
        event("diptych.forward", start, 9000, cat="gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]


def test_time_is_split_by_the_ranges_of_the_training_thread() -> None:
    events = [one for start in (0, 10_000, 20_000, 30_000) for one in a_step(start)]
    events += [event("diptych.forward", -5000, 4000), event("diptych.after", 35_000, 9_000)]
    found = split(reversed(events), skip=1)
    assert (found.steps, found.wall_ms) == (2, 10.0)
    assert found.host_ms == {"data_wait": 1.0, "forward": 2.3, "loss": 0.7, "backward": 4.0, "rest": 2.0}
    assert found.device_ms == {}
    assert found.communication_ms == 0


def kernel(number: int, launch: float, start: float, length: float, **others: Any) -> list[dict[str, Any]]:
    """Launched by another thread than the one that trains, as kernels of backward are."""
    where = {"args": {"correlation": number}, "tid": 9}
    ran = event("gemm", start, length, cat="kernel", **where) | others
    return [event("cudaLaunchKernel", launch, 5, cat="cuda_runtime", **where), ran]


def test_kernels_count_where_they_were_launched() -> None:
    events = [*a_step(0), *a_step(10_000)]
    events += kernel(1, 4500, 6000, 2000)  # in backward
    events += kernel(2, 3300, 7000, 3000)  # in the forward pass within the loss, at the same time
    events += kernel(3, 3900, 12_000, 100)  # in the loss, behind the inner one
    events += kernel(4, 1500, 1600, 500, name="Memcpy HtoD (Pinned -> Device)", cat="gpu_memcpy")
    events += kernel(5, 4600, 9000, 400, name="ncclDevKernel_AllReduce_Sum_f32")
    events += kernel(6, 9500, 9600, 50)  # in no range
    events += kernel(7, 14_500, 15_000, 777)  # in the step that does not count
    found = split(events, skip=0)
    busy = {"backward": 2.0, "forward": 3.0, "loss": 0.1, "host_to_device": 0.5, "communication": 0.4, "rest": 0.05}
    assert {name: value for name, value in found.device_ms.items() if name != "idle"} == pytest.approx(busy)
    assert found.device_ms["idle"] == pytest.approx(10 - 4.0 - 0.1 - 0.5)
    assert found.communication_ms == pytest.approx(0.4)


def test_a_trace_without_ranges_or_with_too_few_steps_is_refused() -> None:
    with pytest.raises(DiptychError, match="no whole step"):
        split([], skip=0)
    with pytest.raises(DiptychError, match="no whole step behind the first 1"):
        split([*a_step(0), *a_step(10_000)], skip=1)


def test_a_real_profile_is_read(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            with torch.profiler.record_function("diptych.data_wait"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            with torch.profiler.record_function("diptych.forward"):
                torch.ones(64, 64) @ torch.ones(64, 64)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = split(json.loads((tmp_path / "trace.json").read_text())["traceEvents"], skip=0)
    assert found.steps == 2
    assert set(found.host_ms) == {"data_wait", "forward", "rest"}
    assert sum(found.host_ms.values()) == pytest.approx(found.wall_ms)


# --- figures -------------------------------------------------------------------------------------------------------


def answer(*seconds: float, **others: Any) -> dict[str, Any]:
    return {"windows": [[2 * i, 2, s] for i, s in enumerate(seconds)], "peak_bytes": 3 * 2**20} | others


def test_a_row_is_the_median_of_rounds_behind_the_warm_up(plan: Plan) -> None:
    found = row("ours", [answer(99, 2, 1, 4), answer(99, 8, 8, 8), answer(99, 4, 4, 4)], plan, FACTS)
    assert found.samples_per_second == 2.0  # eight samples in a window: 4, 1 and 2 a second
    assert found.spread == (1.0, 4.0)
    assert found.seconds_per_step == 2.0
    assert (found.tokens, found.flops_per_sample, found.mfu) == (40, 2e9, 2.0 * 2e9 / 1e12)
    padded = row("open_clip", [answer(99, 4, 4, 4)], plan, FACTS)
    assert (padded.tokens, padded.mfu) == (77, 2.0 * 3e9 / 1e12)


def test_windows_that_are_not_whole_do_not_count(plan: Plan) -> None:
    logged = {"windows": [[1, 2, 50.0], [3, 2, 4.0], [5, 2, 4.0], [7, 1, 100.0]], "peak_bytes": 1}
    assert row("open_clip", [logged], plan, FACTS).samples_per_second == 2.0
    assert "no 2 steps behind the first 2" in row("ours", [answer(1.0)], plan, FACTS).problem


def test_a_checkpoint_costs_what_windows_take_beyond_the_usual(plan: Plan) -> None:
    longer = dataclasses.replace(plan, steps=14)
    assert longer.saving_step == 10
    windows = (9, 2, 2, 4, 2, 5, 3, 2)  # the last three behind the checkpoint
    slow, quick = answer(*windows, written_before_end=2.5), answer(*windows, written_before_end=8.0)
    found = saving([slow], longer)
    assert found == Saving((8.0, 8.0, 8.0), (3.0, 3.0, 3.0), (4.0, 4.0, 4.0))
    assert found.share == pytest.approx(4 / 300)
    assert saving([slow, quick, quick], longer) == Saving((5.0, 5.0, 8.0), (3.0, 3.0, 3.0), (3.0, 3.0, 4.0))
    assert saving([], longer) is None


def test_the_table_says_all_of_it() -> None:
    rows = (
        Row("ours", 200.0, (190.0, 210.0), 0.32, 5 * 2**30, 40, 2e9, 0.4),
        Row("bare", 400.0, (400.0, 400.0), 0.16, 2**30, 40, 2e9, 0.8),
        Row("open_clip", 50.0, (50.0, 50.0), 1.28, 2**30, 77, 3e9, 0.15),
        Row("open_clip-step", problem="out of memory"),
    )
    of_step = Split(4, 10.0, {"data_wait": 2.5, "rest": 7.5}, {"host_to_device": 1.0, "idle": 9.0}, 0.5)
    costs = Saving((8.0, 7.0, 9.0), (1.0, 1.0, 1.0), (3.0, 2.5, 3.5))
    versions = {"ours": {"torch": "2.13.0"}, "open_clip": {"torch": "2.12.0"}}
    report = Report("diptych bench train --device cpu", 64, FACTS, rows, costs, of_step, "", versions)
    lines = table(report).splitlines()
    assert "$ diptych bench train --device cpu" in lines
    assert any("2 threads of" in line and "1 TFLOP/s in bf16 (measured" in line for line in lines)
    assert any("ours: torch 2.13.0; open_clip: torch 2.12.0. 1.5 million parameters" in line for line in lines)
    assert "| ours | 200 (190, 210) | 4.00 | 0.50 | 0.32 | 40 | 2 | 40.0% | 5,120 |" in lines
    assert "| open_clip-step | out of memory | | | | | | | |" in lines
    assert "| data wait | 2.50 | 25.0% |  |  |" in lines
    assert "| idle |  |  | 9.00 | 90.0% |" in lines
    assert any("costs the loop 3.00 s (2.50, 3.50)" in line and "1.00% of the time" in line for line in lines)
    plain = json.loads(json.dumps(as_json(report)))
    assert plain["rows"][0]["samples_per_second"] == 200.0
    assert plain["share_at_five_minutes"] == pytest.approx(0.01)
    unsplit = dataclasses.replace(report, split=None, saving=None, problem="no whole step")
    assert "The time of a step could not be split: no whole step" in table(unsplit)


# --- the whole -----------------------------------------------------------------------------------------------------


def test_the_command_of_a_plan_makes_the_plan(plan: Plan, tmp_path: Path) -> None:
    every = dataclasses.replace(
        plan,
        against=("bare", "ours-saving"),
        peer_python=Path(sys.executable),
        patch_dropout=0.5,
        compile=True,
        checkpoint_activations=True,
        split_steps=6,
        profile=tmp_path / "a trace.json",
        work=tmp_path,
        settings=("micro_batch=2", "optim.peak_lr=1e-4"),
    )
    for each in (plan, every, dataclasses.replace(plan, against=(), settings=())):
        assert _plan_of_training(parse(shlex.split(each.command())[1:])) == each


def test_options_become_the_recipe(plan: Plan) -> None:
    changed = dataclasses.replace(plan, patch_dropout=0.5, compile=True, settings=("micro_batch=2", "data.workers=3"))
    recipe = train.our_recipe(changed, "shards", lanes=6)
    assert recipe.model.towers.vision == {"patch_dropout": 0.5}  # type: ignore[attr-defined]
    assert (recipe.speed.compile, recipe.speed.checkpoint_activations) == (True, False)
    assert (recipe.micro_batch, recipe.data.workers, recipe.total_steps) == (2, 3, 8)
    with pytest.raises(ConfigError, match="use --batch"):
        train.our_recipe(dataclasses.replace(plan, settings=("global_batch=2",)), "shards", lanes=6)


@pytest.mark.slow
def test_each_round_asks_everybody_and_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    said: list[str] = []
    against = ("bare", "open_clip-step", "ours-saving")
    report = measure_all(dataclasses.replace(plan, against=against, work=tmp_path), progress=said.append)
    assert [found.implementation for found in report.rows] == ["ours", *against]
    assert not [found.problem for found in report.rows if found.problem]
    assert all(found.mfu > 0 and found.peak_bytes for found in report.rows)
    assert report.saving is not None
    assert report.versions["ours"].keys() == {"torch", "open_clip_torch"}
    assert "| bare |" in table(report)
    assert not list(tmp_path.iterdir())
    assert "round 1 of 1: bare" in said


def test_what_fails_in_a_process_is_said(plan: Plan, asked: Request, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python{sys.version_info[0]} -S "$@"\n')
    python.chmod(0o755)
    with_peer = dataclasses.replace(plan, against=(PEER,), peer_python=python)
    request = dataclasses.replace(asked, implementation=PEER, folder=str(tmp_path / "process"))
    with pytest.raises(DiptychError, match="No module named 'torch'"):
        train._in_process(request, with_peer)
    assert not (tmp_path / "process").exists()
    with pytest.raises(DiptychError, match="open_clip has no such model"):
        train._in_process(dataclasses.replace(request, model=""), with_peer)


def test_a_model_that_nobody_knows_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(shlex.split(f"bench train --device cpu --model ViT-B-33 --picture 16x16 --work {tmp_path}")) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("diptych: error: open_clip has no model")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--against nobody", "unknown implementation 'nobody' · bench train --against"),
        ("--against open_clip", "an environment of its own · bench train --peer-python"),
        ("--peer-python nowhere/python", "there is no Python at 'nowhere/python' · bench train --peer-python"),
        ("--batch 0", "must be at least 1 · bench train"),
        ("--every 4", "steps (30) and warmup (5) are no multiples of every (4)"),
        ("--steps 2 --against ours-saving", "2 steps behind 5 are too few to save among them"),
        ("--split-steps 3", "needs at least 5 steps, not 3"),
        ("--split-steps 0 --profile trace.json", "needs at least 5 steps, not 0"),
        ("--profile nowhere/at/all.json", "there is no folder for 'nowhere/at/all.json'"),
        ("--picture large", "'large' are no sizes of pictures"),
        ("--work nowhere/at/all", "the data cannot be written"),
        ("optim.peak_rate=1", "peak_rate"),
        ("precision=int8", "precision"),
    ],
)
def test_bad_input_is_one_line(arguments: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"bench train --device cpu {arguments}")) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("bench train --device cuda")) == 2
    assert "there is no CUDA device · bench train --device" in capsys.readouterr().err
