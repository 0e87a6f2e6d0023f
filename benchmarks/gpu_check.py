"""Compare the replay on a GPU with the CPU of the same machine: the bits of every op and scheme, ranks, times, memory.

    python benchmarks/gpu_check.py prepare results/digits_vlm/digits   # where the pipeline has run
    python benchmarks/gpu_check.py trained                             # on the machine with the GPU
    python benchmarks/gpu_check.py standin                             # there too: the shape of Qwen2.5-VL-3B

`prepare` copies snapshot, plan and calibration batches of a run into one folder. The other two read that
folder; they need neither INC nor `datasets`. Each writes a result (JSON) and adds to it after every part.
"""

import argparse
import itertools
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from photos import photo_batch
from real_shape import in_schemes
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from auto_quantize_model import cli
from auto_quantize_model.documents import read_document
from auto_quantize_model.files import InputError, write_json
from auto_quantize_model.machine import (
    choose_device,
    explained_out_of_memory,
    instruction_set,
    require_memory,
)
from auto_quantize_model.made.shapes import SHAPES
from auto_quantize_model.made.standin import build_once
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.measure.states import ALL, states
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import count_parameters, load_model, load_processor, verify_manifest
from auto_quantize_model.needs import GIB, WORKING_BYTES
from auto_quantize_model.records import CalibrationManifest, Capture, ModelManifest, Op, Plan, Scales, as_record
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.devices import op_inputs, site_differences
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.inc_int8 import cpu_kernel
from auto_quantize_model.schemes.scheme import INC_INT8, assigned

MAPS = ("isolated", "fallback", "requantize")
SCHEMES = ["inc_int8", "W8A8", "FP8_DYNAMIC", "W4A16", "NVFP4"]  # of the stand-in, as in the benchmark of the CPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    for work in (prepare, trained, standin):
        step = steps.add_parser(work.__name__)
        step.set_defaults(work=work)
        step.add_argument("--folder", type=Path, default=Path("tmp/bench/gpu"), help="inputs of the check")
        if work is prepare:
            step.add_argument("results", type=Path, help="a finished run on the CPU: results/MODEL/CALIBRATION")
            continue
        step.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries this script out")
        step.add_argument("--out", type=Path, help="where the result goes (default: the folder)")
        if work is standin:
            step.add_argument("--shape", default="qwen2_5_vl_3b", choices=list(SHAPES), help="whose shape")
            step.add_argument("--write-only", action="store_true", help="write the snapshot, and end")
    args = parser.parse_args()
    return cli.run(lambda: args.work(args), None)


def prepare(args: argparse.Namespace) -> None:
    """Gather what the check needs of a run."""
    from auto_quantize_model.data.batches import load_batches  # needs `datasets`

    results = args.results
    snapshot = verify_manifest(as_record(ModelManifest, read_document(results.parent / "model_manifest.json")))
    calibration = as_record(CalibrationManifest, read_document(results / "calibration_manifest.json"))
    processor = load_processor(snapshot, calibration.image_backend)
    batches = load_batches(results / "calibration" / "calibration.parquet", calibration, processor)
    shutil.copytree(snapshot, args.folder / "snapshot", dirs_exist_ok=True)
    shutil.copyfile(results / "plan.json", args.folder / "plan.json")
    tensors = {f"{index}/{name}": tensor for index, batch in enumerate(batches) for name, tensor in batch.items()}
    save_file(tensors, args.folder / "batches.safetensors")


def trained(args: argparse.Namespace) -> None:
    """Every op, scheme, map and batch of the run, on GPU and CPU, INC's INT8 with 7 and with 8 bits of activation."""
    device, result = start(args, "trained")
    plan, batches = read_plan(args.folder), load_batches_of(args.folder)
    result.add("fp32_products", product_errors(device))
    result.add("out_of_memory", out_of_memory(device))
    for bits, planned in (("7_bits", with_range(plan, True)), ("8_bits", with_range(plan, False))):
        choose_device("cpu")
        model: Any = load_model(args.folder / "snapshot")
        if inc_entries(ops_by_type(model, plan)) != inc_entries(plan.ops):
            raise InputError("the plan's entries are not one for each op type, so a stand-in cannot take them")
        with Replay(model, planned.ops, planned.measured_op) as replay:
            scales = replay.calibrate(batches[0])
            inputs = op_inputs(replay, batches[0], replay.order)
        found: dict[str, Any] = {"sites": sites_against_cpu(replay, scales, inputs, planned, device)}
        on_cpu, record = captured(model, batches, planned)
        found["cpu_seconds"] = record["seconds"]
        choose_device(device.type)
        found["fp32_logits"] = logits_difference(model, batches[0], device)
        first, record = captured(model.to(device), batches, planned)
        found["gpu_seconds"] = record["seconds"]
        found["gpu_against_cpu"] = compare(on_cpu, first)
        again, record = captured(model, batches, planned)
        found["gpu_seconds_again"] = record["seconds"]
        found["gpu_twice_the_same_bits"] = again == first
        result.add(bits, found)
    result.add("rounding", rounding(args.folder / "snapshot", batches[0], plan, device))
    compare_schemes(args.folder / "snapshot", batches, plan, device, result)
    result.add("peak", peak(device, args.folder / "snapshot"))


def rounding(directory: Path, batch: Batch, plan: Plan, device: torch.device) -> dict[str, Any]:
    """How many quantized values of weights and inputs differ between the devices, in each scheme of compressed-tensors.

    On the device, the library's own modules compute the output too: with all ops in a scheme, and in a mixture.
    """
    here, there = load_model(directory), load_model(directory).to(device)
    schemes = schemes_of(plan.schemes, here)
    able = {scheme: [op.op_name for op in plan.ops if scheme in op.schemes] for scheme in schemes}
    states = {scheme: assigned(names, scheme) for scheme, names in able.items()}
    states["a mixture"] = {name: scheme for state in states.values() for name, scheme in list(state.items())[::3]}
    found: dict[str, Any] = {}
    with Replay(here, plan.ops, plan.measured_op, schemes=schemes) as on_cpu:
        scales = on_cpu.calibrate(batch)
        inputs = op_inputs(on_cpu, batch, on_cpu.order)
        choose_device(device.type)
        library = Library(there, plan, schemes, scales)
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        expected = {what: library.logits(moved, state) for what, state in states.items()}
        with Replay(there, plan.ops, plan.measured_op, schemes=schemes) as on_device:
            on_device.set_scales(scales)
            for scheme, names in able.items():
                weights, values = [0, 0], [0, 0]
                for name in names:
                    pair = [replay.sites[name].served[scheme] for replay in (on_cpu, on_device)]
                    count(weights, *(side.weight() for side in pair))
                    x = inputs[name]
                    count(values, pair[0].served_input(x), pair[1].served_input(x.to(device)))
                found[scheme] = {"weights": weights, "inputs": values}
            on_device.begin(batch)
            for what, state in states.items():
                counts = [0, 0]
                count(counts, expected[what].cpu(), on_device.run(state))
                found.setdefault(what, {})["logits of the library"] = counts
    return found


def count(counts: list[int], expected: torch.Tensor, found: torch.Tensor) -> None:
    """Add to [differing, all]."""
    counts[0] += int((found.cpu() != expected).sum())
    counts[1] += expected.numel()


def compare_schemes(
    directory: Path, batches: Sequence[Batch], plan: Plan, device: torch.device, result: "Result"
) -> None:
    """The isolated map and the estimates of all schemes on both devices, and the seconds of each."""
    plan = replace(plan, maps=MAPS[:1])
    for exact in ("all", "none"):
        choose_device("cpu")
        on_cpu, record = captured(load_model(directory), batches, plan, exact)
        seconds = {"cpu": record["seconds"]}
        choose_device(device.type)
        model: Any = load_model(directory).to(device)
        first, record = captured(model, batches, plan, exact)
        seconds["gpu"] = record["seconds"]
        again, record = captured(model, batches, plan, exact)
        seconds["gpu_again"] = record["seconds"]
        found = {
            scheme: in_pairs(kl_divergences(on_cpu, scheme), kl_divergences(first, scheme)) for scheme in plan.schemes
        }
        result.add(f"exact_{exact}", {"seconds": seconds, "twice_the_same_bits": again == first, **found})


def kl_divergences(capture: Capture, scheme: str) -> list[float]:
    """The divergence of each op alone: measured on each batch, or estimated where nothing was measured."""
    measured = [score.divergence for of in capture.of_map("isolated", scheme).values() for score in of if score]
    return measured or [made.divergence for made in capture.estimates_of(scheme).values()]


def standin(args: argparse.Namespace) -> None:
    """One photograph on a stand-in of that shape: every op's bits, seconds a map and an op, and memory."""
    started = time.monotonic()
    directory = build_once(SHAPES[args.shape], args.folder / args.shape)
    if args.write_only:
        return
    device, result = start(args, args.shape)
    result.lap("write_snapshot", started)
    batch = photo_batch(directory, 64)
    started = time.monotonic()
    require_memory(count_parameters(directory), device)
    model: Any = load_model(directory)
    result.lap("load_model", started)
    plan = read_plan(args.folder)
    plan = replace(plan, ops=ops_by_type(model, plan), confidence_batches=1, maps=MAPS[:2], measured_op="lm_head")
    plan = with_range(plan, False)
    result.add("ops", len(plan.ops))
    result.add("tokens", batch["input_ids"].shape[1])

    with tempfile.TemporaryDirectory() as folder:
        store = ScoreStore(Path(folder))
        started = time.monotonic()
        model.to(device)
        result.lap("move_to_the_device", started)
        capture, gpu_seconds = measured(model, batch, plan, store, result)
        result.add("peak", peak(device, directory))
        of_schemes = in_schemes(replace(plan, maps=MAPS[:1]), SCHEMES)
        timed_capture(model, batch, of_schemes, store, "none", result)
        result.add("peak_of_estimates", peak(device, directory))
        measured(model, batch, replace(plan, maps=MAPS), store, result)
        result.add("fp32_logits", logits_difference(model, batch, device))
        choose_device("cpu")
        compare_with_cpu(model, batch, plan, device, capture, gpu_seconds, result)
        model.to(choose_device(device.type))
        timed_capture(model, batch, of_schemes, store, "auto", result)
    result.add("peak_of_all", peak(device, directory))


def timed_capture(
    model: torch.nn.Module, batch: Batch, plan: Plan, store: ScoreStore, exact: str, result: "Result"
) -> None:
    """How long a capture takes that measures the scores of `exact`, with how many estimates and scores."""
    started = time.monotonic()
    found, _ = capture_sensitivity(model, [batch], plan, store, exact=exact, say=cli.say)
    result.lap(f"schemes_exact_{exact}", started)
    result.add(f"schemes_exact_{exact}", [len(found.estimates), len(found.scores), found.effort.exact])


def compare_with_cpu(
    model: torch.nn.Module,
    batch: Batch,
    plan: dict[str, Any],
    device: torch.device,
    capture: Capture,
    gpu_seconds: list[float],
    result: "Result",
) -> None:
    """Four ops in two maps on the CPU, and the INT8 outputs of all ops on both devices."""
    started = time.monotonic()
    with Replay(model, plan.ops, plan.measured_op) as replay:
        started = result.lap("cpu_make_sites", started)
        scales = replay.calibrate(batch)
        result.lap("cpu_calibrate", started)
        reference = Reference(replay.begin(batch), batch.get("mm_token_type_ids"))
        states_run = [(label, name) for label, name, _ in states(replay.order, plan.op_names, [*plan.maps, ALL])]
        some = [replay.order[len(replay.order) * part // 8] for part in (7, 5, 3, 1)]
        for label, name, found in timed_states(replay, reference, some):
            score = capture.of_map(label)[name][0]
            seconds = {"cpu": found.pop("seconds"), "gpu": gpu_seconds[states_run.index((label, name))]}
            on_gpu = score.mse_value if score else None
            result.add(f"{label}/{name}", {"seconds": seconds, "gpu_mse_value": on_gpu, **found})
        inputs = op_inputs(replay, batch, replay.order)
    started = time.monotonic()
    result.add("sites", sites_against_cpu(replay, scales, inputs, plan, device))
    result.lap("sites_of_both_devices", started)


class Result(dict[str, Any]):
    """What was found so far, on disk after each addition."""

    def __init__(self, path: Path) -> None:
        super().__init__({"seconds": {}})
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, value: Any) -> None:
        self[key] = value
        write_json(self.path, self)
        cli.say(json.dumps({key: value}))

    def lap(self, step: str, started: float) -> float:
        """Put on record how long a step took that began at `started`, and return the time now."""
        now = time.monotonic()
        self.add("seconds", self["seconds"] | {step: round(now - started, 2)})
        return now


def start(args: argparse.Namespace, name: str) -> tuple[torch.device, Result]:
    """The device, set up as the pipeline sets it up, and a result that says which machine this is."""
    device, result = choose_device(args.device), Result((args.out or args.folder) / f"gpu_check_{name}.json")
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "int8_kernel": cpu_kernel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result.add("machine", machine)
    return device, result


def load_batches_of(folder: Path) -> list[Batch]:
    tensors = load_file(folder / "batches.safetensors")
    by_index = sorted(tensors, key=lambda key: int(key.split("/")[0]))
    groups = itertools.groupby(by_index, key=lambda key: key.split("/")[0])
    return [{key.split("/")[1]: tensors[key] for key in keys} for _, keys in groups]


def read_plan(folder: Path) -> Plan:
    return as_record(Plan, read_document(folder / "plan.json", "plan"))


def with_range(plan: Plan, reduced: bool) -> Plan:
    """The plan with activations of 7 bits (`reduced`) or 8, as INC plans them on CPUs without and with VNNI."""
    ops = []
    for op in plan.ops:
        scheme, side = op.inc_int8, op.inc_int8.activation
        if "reduce_range" in side.observer:
            side = replace(side, observer=side.observer | {"reduce_range": reduced})
        ops.append(replace(op, inc_int8=replace(scheme, activation=side), schemes=(INC_INT8,)))
    return replace(plan, ops=tuple(ops), schemes={INC_INT8: {}}, reduce_range=reduced)


def ops_by_type(model: torch.nn.Module, plan: Plan) -> tuple[Op, ...]:
    """An op for every module of the types that `plan` quantizes: INC gives all ops of one type the same entry."""
    entries = {op.op_type: op for op in plan.ops}
    return tuple(
        replace(
            entries[type(module).__name__],
            op_name=name,
            shape=tuple(module.weight.shape),
            weight_bytes=4 * module.weight.numel(),
            executions=(1,),
            unit=name,
        )
        for name, module in model.named_modules()
        if type(module).__name__ in entries
    )


def inc_entries(ops: Sequence[Op]) -> dict[str, Any]:
    return {op.op_name: replace(op.inc_int8, inc_name="") for op in ops}


def captured(
    model: torch.nn.Module, batches: Sequence[Batch], plan: Plan, exact: str = "all"
) -> tuple[Capture, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return capture_sensitivity(model, batches, plan, ScoreStore(Path(folder)), exact=exact)


def measured(
    model: torch.nn.Module, batch: Batch, plan: Plan, store: ScoreStore, result: Result
) -> tuple[Capture, list[float]]:
    """The capture, and the seconds of each score that `store` lacked, in the order of `states`."""
    marks = [time.monotonic()]
    with cli.progress_bar("capture") as on_progress:

        def progress(done: int, total: int) -> None:
            marks.append(time.monotonic())
            on_progress(done, total)

        capture, record = capture_sensitivity(model, [batch], plan, store, on_progress=progress)
    seconds = [round(after - before, 4) for before, after in itertools.pairwise(marks)]
    labels = [label for label, _, _ in states(plan.op_names, plan.op_names, [*plan.maps, ALL])]
    shown: dict[str, float] = {"to_the_first_score": seconds[0]}
    for label, value in zip(labels[1:], seconds[1:], strict=True):
        shown[label] = shown.get(label, 0.0) + value
    shown = {label: round(value, 2) for label, value in shown.items()}
    result.add(f"capture_after_{record['resumed_scores']}_scores", shown)
    return capture, seconds


def timed_states(
    replay: Replay, reference: Reference, names: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(map, op, record with `seconds`) of the named ops in two maps, each after the state that precedes it there."""
    everything = frozenset(replay.order)
    states: dict[str, Callable[[str], frozenset[str]]] = {
        "isolated": lambda name: frozenset([name]),
        "fallback": lambda name: everything - {name},
    }
    for label, state in states.items():
        for name in names:
            reference.compare(replay.run(assigned(state(replay.order[replay.order.index(name) + 1]))))
            started = time.monotonic()
            record = reference.compare(replay.run(assigned(state(name))))
            yield label, name, {"seconds": round(time.monotonic() - started, 4), **record}


def sites_against_cpu(
    replay: Replay, scales: Scales, inputs: dict[str, torch.Tensor], plan: Plan, device: torch.device
) -> dict[str, Any]:
    """How many INT8 outputs of which ops differ between the devices."""
    found = site_differences(replay.sites, scales, inputs, plan.ops, device)
    return {
        "ops": len(found),
        "values": sum(values for _, values in found.values()),
        "differing": {name: differing for name, (differing, _) in found.items() if differing},
    }


def compare(expected: Capture, found: Capture) -> dict[str, Any]:
    """Per map over all batches: Spearman's rank correlation, relative differences, and equal values."""
    result = {}
    for label in MAPS:
        sides = ([score.mse_value for score in side.scores if score.map == label] for side in (expected, found))
        result[label] = in_pairs(*sides)
    return result


def in_pairs(expected: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation, relative differences, and how many values are equal."""
    pairs = list(zip(expected, found, strict=True))
    apart = [abs(a - b) / a for a, b in pairs if a]
    return {
        "spearman": float(spearmanr(expected, found).statistic),
        "largest_relative_difference": max(apart),
        "median_relative_difference": statistics.median(apart),
        "equal": sum(a == b for a, b in pairs),
        "of": len(pairs),
    }


def logits_difference(model: torch.nn.Module, batch: Batch, device: torch.device) -> float:
    """|| GPU - CPU || / || CPU || of the FP32 logits; the model goes to the device and comes back."""
    with torch.no_grad():
        expected = model.cpu()(**batch).logits.double()
        found = model.to(device)(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.double().cpu()
    model.cpu()
    return float((found - expected).norm() / expected.norm())


def product_errors(device: torch.device) -> dict[str, float]:
    """Relative error of an FP32 product and of an FP32 convolution, as set up and with TF32, against float64."""
    x, weight = torch.randn(512, 1024, device=device), torch.randn(512, 1024, device=device)
    clip, kernel = torch.randn(64, 3, 2, 14, 14, device=device), torch.randn(256, 3, 2, 14, 14, device=device)
    works: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
        "linear": lambda dtype: torch.nn.functional.linear(x.to(dtype), weight.to(dtype)),
        "conv3d": lambda dtype: torch.nn.functional.conv3d(clip.to(dtype), kernel.to(dtype)),
    }
    found = {}
    for name, work in works.items():
        expected = work(torch.float64)
        for tf32 in (False, True):
            choose_device(device.type, tf32=tf32)
            error = (work(torch.float32).double() - expected).norm() / expected.norm()
            found[name + ("_tf32" if tf32 else "")] = float(error)
    choose_device(device.type)
    return found


def out_of_memory(device: torch.device) -> str:
    """What a user reads when the GPU's memory does not suffice."""
    try:
        with explained_out_of_memory(device):
            torch.empty(1 << 46, dtype=torch.uint8, device=device)
    except (InputError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def peak(device: torch.device, directory: Path) -> dict[str, float]:
    """GiB: what `require_memory` asks for, and what was taken."""
    weights = count_parameters(directory)
    found = {"fp32_weights": 4 * weights, "asked_for": 5 * weights + WORKING_BYTES}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
            "in_use_with_context": total - free,
            "total": total,
        }
    return {name: round(size / GIB, 3) for name, size in found.items()}


if __name__ == "__main__":
    raise SystemExit(main())
