"""The full shape of Qwen2.5-VL-3B through plan and capture: time of each step and peak memory, in one process.

    python benchmarks/real_shape.py [--device cpu|cuda] [--threads N] [--exact none --schemes inc_int8 W8A8 ...]
    python benchmarks/real_shape.py --mapped --exact none --schemes W8A8 FP8_DYNAMIC NVFP4
    python benchmarks/real_shape.py --best-model [--shape medium]

The snapshot (7.5 GB, weights from a seed) is written to tmp/bench/ once. The plan is INC's and is written there as
well, so that a machine without INC can run the capture from it. With --best-model, INC makes and saves its INT8 model
instead of the capture. The file is loaded back without FP32 weights, and its error is compared with the replay's.
"""

import argparse
import functools
import json
import re
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from photos import photo_batch
from scipy.stats import spearmanr

from auto_quantize_model import cli
from auto_quantize_model.config import PlanSpec
from auto_quantize_model.files import InputError, read_json, write_json
from auto_quantize_model.machine import choose_device
from auto_quantize_model.made.shapes import SHAPES
from auto_quantize_model.made.standin import build_once
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import count_parameters, load_model
from auto_quantize_model.needs import GIB
from auto_quantize_model.records import Capture, Plan, as_record, body_of
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.scheme import INC_INT8

Timed = Callable[[str, Callable[[], Any]], Any]  # runs a step and says its seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2_5_vl_3b", choices=list(SHAPES), help="whose shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the CPU")
    parser.add_argument("--visual-tokens", type=int, default=64, help="of the one photograph (64: 224 x 224 pixels)")
    parser.add_argument("--maps", nargs="+", default=["isolated", "fallback"], help="maps to measure")
    parser.add_argument("--schemes", nargs="+", default=["inc_int8"], help="schemes to measure")
    parser.add_argument("--exact", default="all", help="scores to measure: all, top:N, or none; others are estimated")
    parser.add_argument("--folder", type=Path, default=Path("tmp/bench"), help="where snapshot, plan and result go")
    parser.add_argument("--mapped", action="store_true", help="leave weights in the files until they are used (CPU)")
    parser.add_argument("--plan-only", action="store_true", help="write the snapshot and the plan, and end")
    parser.add_argument("--best-model", action="store_true", help="save INC's INT8 model, and load it back (CPU)")
    args = parser.parse_args()
    return cli.run(lambda: bench(args), None)


def bench(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    def timed(step: str, work: Any) -> Any:
        started, of_cpu = time.monotonic(), time.process_time()
        result = work()
        seconds[step] = round(time.monotonic() - started, 1)
        cpu_seconds[step] = round(time.process_time() - of_cpu, 1)
        cli.say(f"{step}: {seconds[step]} s, peak memory so far {peak():.1f} GiB")
        return result

    directory = timed("write the snapshot", lambda: build_once(SHAPES[args.shape], args.folder / args.shape))
    batch = photo_batch(directory, args.visual_tokens)
    memory = Memory()
    model: Any = timed("load the model", lambda: load_model(directory, mapped=args.mapped))
    loaded = memory.now()
    if INC_INT8 not in args.schemes:
        with torch.no_grad():
            for _ in range(3):
                timed("a forward", lambda: model(**batch))
    plan_file = args.folder / f"{args.shape}.plan.json"
    if INC_INT8 in args.schemes and not plan_file.exists():
        timed("INC's plan", lambda: make_plan(plan_file, args, model, batch))
    if args.plan_only:
        return
    if args.best_model:
        holder = [model]
        del model  # INC's steps free it
        best_model(args, timed, directory, holder, as_record(Plan, read_json(plan_file)), batch)
        return
    if INC_INT8 in args.schemes:
        plan = in_schemes(replace(as_record(Plan, read_json(plan_file)), maps=tuple(args.maps)), args.schemes)
    else:
        plan = timed("the plan without INC", lambda: plan_of_schemes(args.schemes, model, batch))
    device = choose_device(args.device)
    timed("move to the device", lambda: model.to(device))
    before = peak()
    store = ScoreStore(args.folder / "scores")
    with cli.progress_bar("capture") as on_progress:
        work = functools.partial(
            capture_sensitivity, model, [batch], plan, store, on_progress=on_progress, exact=args.exact, say=cli.say
        )
        captured, record = timed("capture", work)
    size = 4 * count_parameters(directory) / GIB
    result = {
        "shape": args.shape,
        "ops": len(plan.ops),
        "tokens": batch["input_ids"].shape[1],
        "image_tokens": int(batch["mm_token_type_ids"].sum()),
        "maps": args.maps,
        "schemes": args.schemes,
        "effort": body_of(captured.effort),
        "estimates": len(captured.estimates),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "fp32_gib": round(size, 2),
        "peak_gib": round(peak(), 2),
        "peak_before_capture_gib": round(before, 2),
        "peak_over_fp32": round(peak() / size, 2),
        "anonymous_gib": {"loaded": loaded["RssAnon"], "peak": memory.peak["RssAnon"]},
        "mapped_gib": {"loaded": loaded["RssFile"], "peak": memory.peak["RssFile"]},
        "run": record,
    }
    write_json(args.folder / f"real_shape_{args.shape}_{args.device}.json", result)
    write_json(args.folder / f"capture_{args.shape}_{args.device}.json", body_of(captured))
    result["against_other_device"] = compare_devices(args)
    cli.say(json.dumps(result, indent=2))


def best_model(
    args: argparse.Namespace, timed: Timed, directory: Path, holder: list[Any], plan: Plan, batch: Batch
) -> None:
    """INC's INT8 model of all ops: made, saved, and loaded back with one model in memory at a time.

    Raises:
        InputError: the error of the loaded model is not the replay's.
    """
    from auto_quantize_model.inc.audit import incs_surroundings
    from auto_quantize_model.inc.quantize import WEIGHTS, load_quantized, logits, quantize, release

    folder = args.folder / f"best_model_{args.shape}"
    folder.mkdir(exist_ok=True)
    with incs_surroundings(args.threads, plan.reduce_range):
        reference = Reference(logits(holder[0], batch), batch.get("mm_token_type_ids"))
        timed("INC quantizes and saves", lambda: quantize(holder.pop(), [batch], {}, folder))
        release()
        holder.append(timed("load it back", lambda: load_quantized(folder, directory)))
        found = timed("a forward", lambda: reference.compare(logits(holder.pop(), batch)))
        release()
        model = load_model(directory, mapped=args.mapped)
        expected = timed("the replay, all ops in INT8", lambda: replayed(model, plan, batch, reference))
    size = (folder / WEIGHTS).stat().st_size / GIB
    cli.say(f"{WEIGHTS}: {size:.2f} GiB; mse_value {found['mse_value']}, by the replay {expected['mse_value']}")
    if found != expected:
        raise InputError(f"{folder / WEIGHTS}: the loaded model has {found}, and the replay {expected}")


def replayed(model: Any, plan: Plan, batch: Batch, reference: Reference) -> dict[str, float]:
    """The metrics of all ops in INT8."""
    with Replay(model, plan.ops, plan.measured_op) as replay:
        replay.calibrate(batch)
        replay.begin(batch)
        return reference.compare(replay.run(dict.fromkeys(plan.op_names, INC_INT8)))


def in_schemes(plan: Plan, names: list[str]) -> Plan:
    """The plan with the schemes of compressed-tensors that each op can have."""
    if names == ["inc_int8"]:
        return plan
    from auto_quantize_model.schemes.compressed import fields_of, refusal, scheme_of

    schemes = {name: scheme_of(name) for name in names if name != "inc_int8"}
    ops = []
    for op in plan.ops:
        able = [name for name, scheme in schemes.items() if not refusal(scheme, op.op_type, op.shape)]
        ops.append(replace(op, schemes=("inc_int8", *able)))
    fields = {"inc_int8": {}} | {name: fields_of(scheme) for name, scheme in schemes.items()}
    return replace(plan, ops=tuple(ops), schemes=fields)


def compare_devices(args: argparse.Namespace) -> dict[str, Any]:
    """Rank correlation (Spearman) and largest relative difference of CPU and GPU, for each map that both measured."""
    files = [args.folder / f"capture_{args.shape}_{device}.json" for device in ("cpu", "cuda")]
    if not all(path.exists() for path in files):
        return {"not_run": "one device only"}
    sides = [as_record(Capture, read_json(path)) for path in files]
    found = {}
    for label in args.maps:
        cpu, gpu = (
            [score.mse_value for score in side.scores if (score.map, score.scheme) == (label, "inc_int8")]
            for side in sides
        )
        found[label] = {
            "spearman": float(spearmanr(cpu, gpu).statistic),
            "largest_relative_difference": max(abs(a - b) / a for a, b in zip(cpu, gpu, strict=True)),
        }
    return found


def make_plan(path: Path, args: argparse.Namespace, model: Any, batch: Any) -> None:
    from auto_quantize_model.inc.plan import build_plan

    spec = PlanSpec(confidence_batches=1, maps=("isolated", "fallback", "requantize"))
    write_json(path, body_of(replace(build_plan(model, [batch], spec), model=args.shape, model_digest="0" * 64)))


class Memory:
    """The resident memory of this process in GiB, anonymous and of mapped files, and the most that a thread saw."""

    def __init__(self) -> None:
        self.peak = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> dict[str, float]:
        status = Path("/proc/self/status").read_text()
        pairs = re.findall(r"(RssAnon|RssFile):\s+(\d+) kB", status)
        return {name: round(int(size) / (GIB >> 10), 2) for name, size in pairs}

    def _watch(self) -> None:
        while True:
            self.peak = {name: max(size, self.peak[name]) for name, size in self.now().items()}
            time.sleep(0.05)


def plan_of_schemes(schemes: list[str], model: Any, batch: Batch) -> Plan:
    """A plan for which INC is not asked."""
    from auto_quantize_model.inc.plan import build_plan

    return build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=("isolated",), schemes=tuple(schemes)))


def peak() -> float:
    """This process's peak resident memory, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB >> 10)


if __name__ == "__main__":
    raise SystemExit(main())
