"""Fisher probes against exact scores: SmolLM2-135M, all linears in all schemes of config/smollm2_135m.yaml.

    make run CONFIG=config/smollm2_135m.yaml
    python benchmarks/estimates.py [--batches N] [--heldout N]

Every score of the isolated map is measured, and every one is estimated by 4, 16 and 64 probes. The tables say how far
estimates and scores agree, and how long both take. They also say what an allocation of NVFP4 and FP8_DYNAMIC at 5.0
bits a weight loses by estimates. Exact scores go to a store in tmp/bench, so a killed run resumes. Its seconds are then
scaled to all scores.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import machine

from auto_quantize_model import cli
from auto_quantize_model.commands.loaded import Loaded
from auto_quantize_model.commands.run import DOCUMENTS, open_run
from auto_quantize_model.decide.allocate import allocate
from auto_quantize_model.decide.stability import tau
from auto_quantize_model.files import write_json
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.metrics import Reference
from auto_quantize_model.measure.probes import Values, estimates, probe
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Op, Options, Plan
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.replay.scales import ALL_BATCHES
from auto_quantize_model.schemes.scheme import INC_INT8

FOLDER = Path("tmp/bench/estimates")
PROBES = (4, 16, 64)
TOP = 20
CHOICE = ("NVFP4", "FP8_DYNAMIC")
BUDGET = 5.0  # bits a weight
KL = dict[str, dict[str, float]]  # {scheme: {op_name: nats}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/smollm2_135m/moby_dick"), help="of the run")
    parser.add_argument("--batches", type=int, default=1, help="calibration batches of 256 tokens to score")
    parser.add_argument("--heldout", type=int, default=16, help="held-out batches for the allocations")
    args = parser.parse_args()
    return cli.run(lambda: bench(args), None)


def loaded_run(results: Path, *more: str) -> Loaded:
    """The documents of a finished run of the pipeline on the CPU: those that a model needs, and `more`."""
    names = {"manifest": results.parent / "model_manifest.json"}
    names |= {name: results / f"{name}.json" for name in ("calibration_manifest", "plan")}
    names |= {name: results / f"{name}_cpu.json" for name in ("scales", *more)}
    sets = {f"{name}_set": results / f"calibration/{name}.parquet" for name in ("calibration", "heldout")}
    options = dict.fromkeys(DOCUMENTS) | names | sets
    return Loaded(open_run(argparse.Namespace(writes=(), **options)))


def bench(args: argparse.Namespace) -> None:
    cli.say(f"\n{machine()}\n")
    loaded = loaded_run(args.results)
    plan = loaded.run.plan
    if args.batches > plan.confidence_batches:
        raise SystemExit(f"the plan scores {plan.confidence_batches} batches; lower --batches")
    plan = first_batches(plan, args.batches)
    model, batches = loaded.model(), loaded.batches(args.batches)
    exact, seconds = exactly(loaded, plan, model, batches)
    made, spent = by_probes(loaded, plan, model, batches)
    ops = {op.op_name: op for op in plan.ops if all(name in op.schemes for name in plan.schemes)}
    result: dict[str, Any] = {"exact_seconds": seconds, "probe_seconds": spent, "ops": len(ops)}
    result["agreement"] = {
        count: {scheme: compared(exact[scheme], found[scheme], ops) for scheme in plan.schemes}
        for count, found in made.items()
    }
    result["between"] = between(exact, list(ops))
    rankings = {f"{count} probes": found for count, found in made.items()} | {"exact scores": exact}
    result["allocation"] = allocations(loaded, plan, model, args.heldout, ops, exact, rankings)
    write_json(FOLDER / "estimates.json", result | {"exact": exact, "estimates": made})
    cli.say(tables(result))
    draw(exact, made, list(ops), FOLDER / "estimates.png")


def first_batches(plan: Plan, count: int) -> Plan:
    """The plan of fewer scored batches."""
    ops = tuple(replace(op, executions=op.executions[:count]) for op in plan.ops)
    return replace(plan, confidence_batches=count, ops=ops)


def exactly(loaded: Loaded, plan: Plan, model: torch.nn.Module, batches: Sequence[Any]) -> tuple[KL, float]:
    """Every exact score, and the seconds that all of them take."""
    started = time.monotonic()
    with cli.progress_bar("exact scores") as on_progress:
        capture, record = capture_sensitivity(
            model,
            batches,
            plan,
            ScoreStore(FOLDER / "scores"),
            loaded.scales_of_batches()[: len(batches)],
            on_progress,
            of_all=loaded.scales[ALL_BATCHES],
        )
    seconds = (
        (time.monotonic() - started) * len(capture.scores) / max(1, len(capture.scores) - record["resumed_scores"])
    )
    found: KL = {}
    for scheme in plan.schemes:
        of_map = capture.of_map("isolated", scheme)
        found[scheme] = {
            name: math.fsum(score.divergence or 0.0 for score in scores if score) / len(batches)
            for name, scores in of_map.items()
        }
    return found, seconds


def by_probes(
    loaded: Loaded, plan: Plan, model: torch.nn.Module, batches: Sequence[Any]
) -> tuple[dict[int, KL], dict[int, float]]:
    """The estimates by each number of probes, and their seconds."""
    found: dict[int, KL] = {}
    seconds: dict[int, float] = {}
    for count in PROBES:
        started = time.monotonic()
        values: list[list[Values]] = []
        # A new replay each time, so that each count pays for its quantized weights.
        with Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(plan.schemes, model)) as replay:
            able = {op.op_name: ([op.op_name], op.schemes) for op in plan.ops}
            for index, (batch, scales) in enumerate(zip(batches, loaded.scales_of_batches(), strict=False)):
                replay.set_scales(scales, loaded.scales[ALL_BATCHES])
                replay.begin(batch)
                values.append(probe(replay, able, [10_000 * index + number for number in range(count)]))
        seconds[count] = time.monotonic() - started
        found[count] = {scheme: {} for scheme in plan.schemes}
        for one in estimates(values):
            found[count][one.scheme][one.op_name] = one.divergence
        cli.say(f"{count} probes: {seconds[count]:.0f} s")
    return found, seconds


def top(values: Mapping[str, float], count: int) -> list[str]:
    return sorted(values, key=lambda name: -values[name])[:count]


def compared(exact: Mapping[str, float], made: Mapping[str, float], ops: Mapping[str, Op]) -> dict[str, Any]:
    """How estimates of one scheme agree with the exact scores."""
    truth, order = set(top(exact, TOP)), top(made, len(made))
    return {
        "tau": tau([exact[name] for name in exact], [made[name] for name in exact]),
        "top": len(truth & set(order[:TOP])),
        "needed": max(order.index(name) for name in truth) + 1,
        "ratio": math.fsum(made.values()) / math.fsum(exact.values()),
    }


def between(exact: KL, ops: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Kendall's tau and the shared ops of the top ten between schemes, on the ops that have all schemes."""
    found: dict[str, dict[str, Any]] = {}
    for first in exact:
        for second in exact:
            one, other = ({name: exact[scheme][name] for name in ops} for scheme in (first, second))
            shared = len(set(top(one, 10)) & set(top(other, 10)))
            found.setdefault(first, {})[second] = [tau(list(one.values()), list(other.values())), shared]
    return found


def bits(ops: Mapping[str, Op], state: Mapping[str, str]) -> float:
    """Stored bits of a weight with its scales, on average."""
    return 8 * sum(ops[op].stored_bytes[scheme] for op, scheme in state.items()) / weights(ops)


def weights(ops: Mapping[str, Op]) -> int:
    return sum(math.prod(op.shape) for op in ops.values())


def allocated(ops: Mapping[str, Op], scores: KL) -> dict[str, str]:
    """The scheme of each op with the least sum of scores within the budget."""
    options = [
        Options(name, (name,), 0, *({key: of[key] for key in CHOICE} for of in (op.stored_bytes, of_op)), {})
        for name, op in ops.items()
        for of_op in ({scheme: scores[scheme][name] for scheme in CHOICE},)
    ]
    return dict(zip(ops, allocate(options, int(BUDGET * weights(ops) / 8)), strict=True))


def allocations(
    loaded: Loaded,
    plan: Plan,
    model: torch.nn.Module,
    heldout: int,
    ops: Mapping[str, Op],
    exact: KL,
    rankings: Mapping[str, KL],
) -> dict[str, dict[str, float]]:
    """Each ranking's allocation: the sum of its exact scores, and the measured KL on held-out samples."""
    by_inc = {CHOICE[0]: exact[INC_INT8], CHOICE[1]: dict.fromkeys(ops, 0.0)}
    chosen = {name: allocated(ops, scores) for name, scores in rankings.items()}
    chosen["INC's INT8 scores"] = allocated(ops, by_inc)
    chosen |= {f"all in {scheme}": dict.fromkeys(ops, scheme) for scheme in CHOICE}
    batches, _ = loaded.heldout(heldout)
    measured = held_out(plan, loaded, model, batches, chosen)
    return {
        name: {
            "sum": math.fsum(exact[scheme][op] for op, scheme in state.items()),
            "heldout": measured[name],
            "bits": bits(ops, state),
        }
        for name, state in chosen.items()
    }


def held_out(
    plan: Plan, loaded: Loaded, model: torch.nn.Module, batches: Sequence[Any], chosen: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    """The mean KL divergence of each state on held-out batches, in nats."""
    found: dict[str, list[float]] = {name: [] for name in chosen}
    with Replay(model, plan.ops, plan.measured_op, schemes=schemes_of(plan.schemes, model)) as replay:
        replay.set_scales(loaded.scales[ALL_BATCHES])
        for batch in batches:
            reference = Reference(replay.begin(batch).clone(), None)
            for name, state in chosen.items():
                found[name].append(reference.compare(replay.run(state))["divergence"])
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def tables(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| probes | scheme | tau | top 20 found | exact runs for the top 20 | sum, estimate / exact | seconds |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for count, schemes in result["agreement"].items():
        for index, (scheme, row) in enumerate(schemes.items()):
            seconds = f"{result['probe_seconds'][count]:.0f}, all schemes" if not index else ""
            numbers = f"{row['tau']:.2f} | {row['top']} | {row['needed']} | {row['ratio']:.2f}"
            lines.append(f"| {count} | {scheme} | {numbers} | {seconds} |")
    lines += ["", f"All exact scores: {result['exact_seconds']:.0f} s.", ""]
    lines += ["| ranking | bits | sum of exact scores | held-out KL |", "|---|---:|---:|---:|"]
    for name, row in result["allocation"].items():
        lines.append(f"| {name} | {row['bits']:.2f} | {row['sum']:.4f} | {row['heldout']:.4f} |")
    names = list(result["between"])
    lines += ["", f"| tau, top 10 shared | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for first in names:
        cells = [f"{value:.2f}, {shared}" for value, shared in result["between"][first].values()]
        lines.append(f"| {first} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(exact: KL, made: Mapping[int, KL], ops: Sequence[str], path: Path) -> None:
    """A panel for each number of probes: the estimate of each op in each scheme over its exact score."""
    import altair

    panels = []
    for count, schemes in made.items():
        points = [
            {"scheme": scheme, "exact": exact[scheme][name], "estimate": schemes[scheme][name]}
            for scheme in exact
            for name in ops
            if exact[scheme][name] > 0 and schemes[scheme][name] > 0
        ]
        scale = altair.Scale(type="log", domain=[1e-7, 1], nice=False)
        axis = altair.Axis(format="~e", tickCount=4)
        chart = altair.Chart(altair.Data(values=points), title=f"{count} probes", width=240, height=240)
        diagonal = altair.Chart(altair.Data(values=[{"exact": end, "estimate": end} for end in (1e-7, 1)]))
        x = altair.X("exact:Q", scale=scale, axis=axis, title="exact KL (nats)")
        y = altair.Y("estimate:Q", scale=scale, axis=axis, title="estimated KL (nats)")
        color = altair.Color("scheme:N", scale=altair.Scale(scheme="dark2"))
        dots = chart.mark_point(filled=True, size=14, opacity=0.6, clip=True).encode(x=x, y=y, color=color)
        panels.append(diagonal.mark_line(color="#555555", strokeDash=[5, 4], strokeWidth=1).encode(x=x, y=y) + dots)
    altair.hconcat(*panels).configure(background="white").save(path, scale_factor=1.5)
    cli.say(f"the plot: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
