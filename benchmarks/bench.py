"""Measure equality with INC, speed next to INC, and the growth of the cost; print Markdown for docs/performance.md.

    python benchmarks/bench.py [equality] [speed] [kernel] [schemes] [growth]

Every figure is measured in this run. Speed is a ratio of seconds for one op. INC and replay take turns in one process.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from photos import photo_batch

from auto_quantize_model import cli
from auto_quantize_model.config import Config, PlanSpec
from auto_quantize_model.data.batches import batches_of, extract
from auto_quantize_model.data.digits import shipped_training
from auto_quantize_model.files import write_json
from auto_quantize_model.inc.engine import inc_scores
from auto_quantize_model.inc.plan import build_plan, quant_config
from auto_quantize_model.machine import instruction_set
from auto_quantize_model.made.shapes import SHAPES
from auto_quantize_model.made.standin import build_once
from auto_quantize_model.measure.states import states
from auto_quantize_model.models.snapshot import build_manifest, load_model, load_processor
from auto_quantize_model.records import Plan
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.schemes.inc_int8 import cpu_kernel, pack_linear
from auto_quantize_model.schemes.scheme import assigned

MAPS = ("isolated", "fallback", "requantize")
# INC measures single ops of `requantize` from the state before them.
INC_MAP = {"isolated": "isolated", "fallback": "fallback", "requantize": "requantize_at"}
FOLDER = Path("tmp/bench")
DIGITS_VLM = Path("resources/models/digits_vlm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="what to measure")
    parser.add_argument("--ops", type=int, default=6, help="ops that INC measures on the medium model, per map")
    args = parser.parse_args()
    return cli.run(lambda: bench(args), None)


def bench(args: argparse.Namespace) -> None:
    cli.say(f"\n{machine()}\n")
    for part in args.parts:
        result = PARTS[part](args)
        write_json(FOLDER / f"{part}.json", result)


def machine() -> str:
    """The machine and the versions of these figures."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("neural-compressor", "torch", "transformers"))
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    adds = f"{instruction_set()}, INT8 products {cpu_kernel()}"
    return f"{cpu}, {adds}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"


def inc_values(model: Any, plan: Plan, batch: Any, label: str, names: list[str]) -> dict[str, float]:
    """INC's scores of the named ops, by module name."""
    modules = plan.by_inc_name
    scores, _ = inc_scores(model, quant_config(1), batch, plan.measured_op, label, names)
    return {modules[name]: value for name, value in scores.items()}


def replayed(model: Any, plan: Plan, batch: Any) -> dict[tuple[str, str], float]:
    """Every value of every map, by replay: {(map, op): value}."""
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batch)
        reference = replay.measured
        names = plan.op_names
        return {
            (label, name): float((reference - replay.run(state)).pow(2).sum())
            for label, name, state in states(replay.order, names, MAPS)
        }


def equality(args: argparse.Namespace) -> dict[str, Any]:
    """All ops of the embedded default, three maps, two batches: how many values differ from INC's."""
    manifest = build_manifest(DIGITS_VLM, "digits_vlm", "digits", {"training": shipped_training(DIGITS_VLM)})
    processor, model = load_processor(DIGITS_VLM), load_model(DIGITS_VLM)
    spec = Config().calibration.model_copy(update={"num_samples": 4, "num_heldout": 0})
    samples, _, calibration = extract(spec, processor, manifest)
    batches = batches_of(samples, calibration.batch_size, processor)
    plan = build_plan(model, batches, PlanSpec(confidence_batches=2, maps=MAPS))
    names = plan.op_names
    compared = differing = 0
    seconds = {"INC": 0.0, "replay": 0.0}
    for batch in batches:
        started = time.monotonic()
        ours = replayed(model, plan, batch)
        seconds["replay"] += time.monotonic() - started
        for label in MAPS:
            started = time.monotonic()
            theirs = inc_values(model, plan, batch, label, names)
            seconds["INC"] += time.monotonic() - started
            compared += len(theirs)
            differing += sum(ours[label, name] != value for name, value in theirs.items())
    cli.say(
        f"digits_vlm, {len(names)} ops, {len(MAPS)} maps, {len(batches)} batches: {differing} of {compared} values"
        f" differ from INC's; INC took {seconds['INC']:.0f} s, replay {seconds['replay']:.1f} s"
    )
    return {"ops": len(names), "compared": compared, "differing": differing, "seconds": seconds}


def medium() -> tuple[Any, Plan, Any]:
    """The model of real proportions, its plan, and a batch with a photograph."""
    directory = build_once(SHAPES["medium"], FOLDER / "medium")
    batch = photo_batch(directory, 100)
    model = load_model(directory)
    return model, build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=MAPS)), batch


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for one op of the fallback map. INC and replay take turns. The values of all maps must be equal.

    INC's time runs from the start of one op to the start of the next op. INC's planning, its FP32 run and its second
    pass are left out. The replay's time is a whole map, with FP32 run and calibration, divided by the number of ops.
    """
    model, plan, batch = medium()
    names = plan.op_names
    chosen = names[:: max(1, len(names) // args.ops)][: args.ops]
    ours: dict[tuple[str, str], float] = {}
    differing = compared = 0
    turns = []
    for pair in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        started = time.monotonic()
        ours |= one_map(model, plan, batch, "fallback")
        turn = {"replay": (time.monotonic() - started) / len(names)}
        taken_up: list[float] = []
        scores, _ = inc_scores(
            model,
            quant_config(1),
            batch,
            plan.measured_op,
            "fallback",
            pair,
            lambda *_, taken_up=taken_up: taken_up.append(time.monotonic()),  # type: ignore[misc]
        )
        turn["INC"] = taken_up[1] - taken_up[0]
        turns.append(turn)
        cli.say(f"INC {turn['INC']:.2f} s an op, replay {turn['replay']:.3f} s an op")
    ours |= one_map(model, plan, batch, "isolated") | one_map(model, plan, batch, "requantize")
    for label in MAPS:
        for name, value in inc_values(model, plan, batch, INC_MAP[label], chosen).items():
            compared += 1
            differing += value != ours[label, name]
    ratios = [turn["INC"] / turn["replay"] for turn in turns]
    inc, replay = (statistics.median(turn[side] for turn in turns) for side in ("INC", "replay"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cli.say(
        f"\n{parameters / 1e6:.0f} M parameters, {len(names)} ops, {batch['input_ids'].shape[1]} tokens, of them"
        f" {int(batch['mm_token_type_ids'].sum())} of a photograph; fallback map, medians of {len(turns)} turns:\n\n"
        "| INC, s an op | replay, s an op | ratio | lowest to highest |\n|---:|---:|---:|---|\n"
        f"| {inc:.2f} | {replay:.3f} | {inc / replay:.0f} | {min(ratios):.0f} to {max(ratios):.0f} |\n\n"
        f"{differing} of {compared} values differ from INC's ({len(chosen)} ops, all maps)"
    )
    return {"compared": compared, "differing": differing, "ops": len(names), "turns": turns, "ratio": inc / replay}


def one_map(model: Any, plan: Plan, batch: Any, label: str) -> dict[tuple[str, str], float]:
    """A whole map by replay, from its start."""
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batch)
        reference = replay.measured
        names = plan.op_names
        return {
            (label, name): float((reference - replay.run(state)).pow(2).sum())
            for _, name, state in states(replay.order, names, [label])
        }


def kernel(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one INT8 linear in four ways, and of a whole forward in INT8 and in FP32.

    The replay calls torch's quantized kernel, as INC's model does. Two other ways give the product alone, without
    roundings: `_int_mm`, and float32 products of codes in pieces of at most 1,024 columns. The latter are exact,
    because every partial sum stays below 2^24.
    """
    rows = []
    for tokens, columns, outputs in ((96, 576, 1536), (96, 1536, 576), (114, 1024, 2752), (114, 2752, 1024)):
        x, weight = torch.randn(tokens, columns), torch.randn(outputs, columns)
        codes, weight_codes = (torch.randint(-128, 128, part.shape, dtype=torch.int8) for part in (x, weight))
        packed = pack_linear(weight_codes, torch.full((outputs,), 0.01), None)

        def quantized(x: torch.Tensor = x, packed: Any = packed) -> torch.Tensor:
            codes = torch.quantize_per_tensor(x, 0.03, 64, torch.quint8)
            output: torch.Tensor = torch.ops.quantized.linear(codes, packed, 0.05, 64)
            return output.dequantize()

        pairs = list(zip(codes.split(1024, dim=1), weight_codes.split(1024, dim=1), strict=True))
        ways: dict[str, Any] = {
            "FP32": functools.partial(torch.nn.functional.linear, x, weight),
            "kernel": quantized,
            "_int_mm": functools.partial(torch._int_mm, codes, weight_codes.t()),
            "float32 codes": lambda pairs=pairs: sum((a.float() @ b.float().t()).int() for a, b in pairs),
        }
        rows.append({"shape": [tokens, columns, outputs]} | {name: milliseconds(way) for name, way in ways.items()})
        cli.say(json.dumps(rows[-1]))
    model, plan, batch = medium()
    with Replay(model, plan.ops, plan.measured_op, cache_bytes=0) as replay:
        replay.calibrate(batch)
        int8_ops = {"FP32": {}, "INT8": assigned(replay.order)}
        forward = {name: milliseconds(functools.partial(replay.run, state)) for name, state in int8_ops.items()}
    cli.say(f"a forward of the 150 M model: {json.dumps(forward)} ms")
    return {"linears": rows, "forward": forward}


def schemes(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a forward with every op in a scheme, next to FP32, and of making the quantized weights once."""
    directory = build_once(SHAPES["medium"], FOLDER / "medium")
    batch, model = photo_batch(directory, 100), load_model(directory)
    names = ("inc_int8", "W8A8", "FP8", "FP8_DYNAMIC", "W4A16", "MXFP4", "NVFP4")
    plan = build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=("isolated",), schemes=names))
    rows = []
    for name in names:
        fields = {name: plan.schemes[name]}
        with Replay(model, plan.ops, plan.measured_op, cache_bytes=0, schemes=schemes_of(fields, model)) as replay:
            replay.calibrate(batch)
            able = [op.op_name for op in plan.ops if name in op.schemes and op.op_name in replay.order]
            started = time.monotonic()
            replay.run(assigned(able, name))  # makes the weights
            first = 1000 * (time.monotonic() - started)
            fp32, whole = (milliseconds(functools.partial(replay.run, state)) for state in ({}, assigned(able, name)))
        rows.append({"scheme": name, "ops": len(able), "fp32": fp32, "forward": whole, "weights": first - whole})
        cli.say(json.dumps(rows[-1]))
    head = "| scheme | ops | FP32, ms | scheme, ms | ratio | weights once, ms |\n|---|---:|---:|---:|---:|---:|\n"
    lines = [
        f"| {row['scheme']} | {row['ops']} | {row['fp32']:.0f} | {row['forward']:.0f}"
        f" | {row['forward'] / row['fp32']:.2f} | {row['weights']:.0f} |"
        for row in rows
    ]
    tokens = batch["input_ids"].shape[1]
    cli.say(f"\nForward of the 150 M model, {tokens} tokens, lowest of five calls:\n\n{head}" + "\n".join(lines))
    return {"rows": rows, "tokens": tokens}


def milliseconds(work: Callable[[], Any]) -> float:
    """The lowest time of five calls after a first one."""
    times = []
    for _ in range(6):
        started = time.monotonic()
        work()
        times.append(1000 * (time.monotonic() - started))
    return round(min(times[1:]), 2)


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the isolated and the fallback map against tokens, and against ops at a fixed number of tokens."""
    points = []
    for depth, tokens in settings():
        vision = SHAPES["medium"]["vision_config"] | {"depth": depth, "fullatt_block_indexes": [depth - 1]}
        shape = SHAPES["medium"] | {"num_hidden_layers": depth, "vision_config": vision}
        directory = build_once(shape, FOLDER / f"medium_{depth}")
        batch, model = photo_batch(directory, tokens), load_model(directory)
        plan = build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=MAPS))
        point: dict[str, Any] = {"ops": len(plan.ops), "tokens": batch["input_ids"].shape[1]}
        for label in ("isolated", "fallback"):
            started = time.monotonic()
            one_map(model, plan, batch, label)
            point[label] = time.monotonic() - started
        points.append(point)
        cli.say(json.dumps(point))
    plot(points, FOLDER / "growth.svg")
    return {"points": points}


def settings() -> Iterator[tuple[int, int]]:
    """(layers of each tower, visual tokens): first more layers, then more tokens."""
    yield from ((depth, 100) for depth in (2, 4, 8, 12))
    yield from ((4, tokens) for tokens in (50, 200, 400, 800))


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Two panels of time: against ops, and against tokens."""
    import altair

    panels = []
    for axis, wanted in (("ops", points[:4]), ("tokens", [points[1], *points[4:]])):
        rows = [
            {axis: point[axis], "map": label, "seconds": point[label]}
            for point in wanted
            for label in ("isolated", "fallback")
        ]
        marks = altair.Chart(altair.Data(values=rows), title=f"seconds a map against {axis}", width=280, height=180)
        panels.append(
            marks.mark_line(point=True).encode(
                x=f"{axis}:Q", y="seconds:Q", color=altair.Color("map:N", scale=altair.Scale(scheme="dark2"))
            )
        )
    (panels[0] | panels[1]).save(path)
    cli.say(f"the plot: {path}")


PARTS = {"equality": equality, "speed": speed, "kernel": kernel, "schemes": schemes, "growth": growth}

if __name__ == "__main__":
    raise SystemExit(main())
