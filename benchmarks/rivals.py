"""Choices of schemes by this project, by its rivals and by rules, judged alike on SmolLM2-135M.

    make run CONFIG=config/smollm2_135m.yaml
    python benchmarks/rivals.py [--results FOLDER] [--without RIVAL ...]

Each weight can have NVFP4, FP8_DYNAMIC or BF16. ModelOpt's `auto_quantize` and AutoRound's AutoScheme run in virtual
environments in tmp/, with one thread. Each choice is run on the held-out passages in this project's arithmetic. Rivals
count bytes in their own ways. So this project chooses for the bytes of the rival that takes the fewest, and the choices
are compared passage by passage. Seconds are those of the CPU, so other work on the machine does not count. For its own
seconds this project scores the two candidates again, and refines its choices. A killed run resumes, with what
tmp/bench/rivals holds.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench import machine
from estimates import loaded_run

from auto_quantize_model import cli
from auto_quantize_model.commands.loaded import Loaded
from auto_quantize_model.config import DecideSpec
from auto_quantize_model.data.batches import load_samples
from auto_quantize_model.decide.allocate import Choice, allocate, at_random, edges_first, loss_of, state_of, uniform
from auto_quantize_model.decide.frontier import options_of
from auto_quantize_model.decide.refine import CODE, Budget, Refinement
from auto_quantize_model.files import InputError, read_json, write_json
from auto_quantize_model.measure.aggregate import interval
from auto_quantize_model.measure.capture import capture_sensitivity
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.records import Options, Plan, digest_of_record
from auto_quantize_model.replay.scales import ALL_BATCHES
from auto_quantize_model.schemes.scheme import UNQUANTIZED, Assignment

FOLDER = Path("tmp/bench/rivals")
CANDIDATES = ("NVFP4", "FP8_DYNAMIC")
BITS = (5.0, 6.0)  # budgets, on average over the weights that can be decided, with their scales
HELDOUT = 32  # passages of 256 tokens
PARTS = 3  # of each other held-out passage, so that ModelOpt has its default number of samples
SEEDS = 3  # random choices for each budget
OURS, UNREFINED = "this project", "this project, not refined"
REFINE = 16  # calibration passages on which this project refines a choice
NAMES = {"modelopt": "ModelOpt `auto_quantize`", "auto_round": "AutoRound AutoScheme"}
PACKAGES = {"modelopt": ["nvidia-modelopt==0.47.0", "requests==2.34.2"], "auto_round": ["auto-round==0.16.1"]}
# Samples to score: the defaults of the rivals, and for ModelOpt also as many as this project scores or calibrates by.
COUNTS = {"modelopt": [4, 32, 128], "auto_round": [16]}
CALIBRATE = 8  # samples by which ModelOpt sets the range of NVFP4's inputs
Found = dict[str, dict[str, Any]]  # {samples scored, or own method: {choices: {budget: state}, seconds}}
Partners = Mapping[float | None, Assignment]  # this project's choices by their budgets


@dataclass(frozen=True)
class Method:
    """One choice of schemes.

    Attributes:
        name: of the method.
        budget: bits; None for a choice without a budget.
        state: {op_name: scheme}.
        partner: this project's choice for the same budget; None without a comparison.
        samples: how many were scored, in `seconds` of the CPU; None for a rule without scores.
    """

    name: str
    budget: float | None
    state: Assignment
    partner: Assignment | None = None
    samples: int | None = None
    seconds: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/smollm2_135m/moby_dick"), help="of the run")
    parser.add_argument("--without", nargs="+", choices=NAMES, default=[], help="rivals that are left out")
    args = parser.parse_args()
    return cli.run(lambda: bench(args), None)


def bench(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cli.say(f"\n{machine()}\n")
    loaded = loaded_run(args.results, "capture")
    units = options_of(loaded.run.plan, loaded.run.capture, CANDIDATES, DecideSpec())[1]
    space = Space(loaded.run.plan, units)
    found = {rival: rivals_choices(rival, loaded) for rival in NAMES if rival not in args.without}
    own = space.by_ours(ours(loaded, space, space.sizes(found.values())), loaded.run.plan.confidence_batches)
    partners = {method.budget: method.state for method in own if method.name == OURS}
    methods = [*own, *space.by_rules(partners)]
    for rival, of_rival in found.items():
        methods += space.by_rival(NAMES[rival], of_rival, partners)
    rows = judged(loaded, space, methods)
    write_json(FOLDER / "rivals.json", {"machine": machine(), "without": args.without, "rows": rows})
    cli.say(table(rows))


class Space:
    """The choices that are possible: which op can have which scheme, and the bytes."""

    def __init__(self, plan: Plan, units: Sequence[Options]) -> None:
        self.units, self.ops = units, {op.op_name: op for op in plan.ops}
        self.names = [name for unit in units for name in unit.ops]
        self.weights = sum(unit.weights for unit in units)

    def budget(self, bits: float) -> int:
        return int(bits * self.weights / 8)

    def state(self, choice: Choice) -> Assignment:
        """A choice for each unit as an assignment."""
        return state_of(choice, self.units)

    def bytes(self, state: Assignment) -> int:
        """The bytes of all weights that are decided, with scales; unquantized ones are BF16."""
        ops = [(self.ops[name], state.get(name)) for name in self.names]
        return sum(op.stored_bytes[scheme] if scheme else op.weight_bytes // 2 for op, scheme in ops)

    def bits(self, state: Assignment) -> float:
        return 8 * self.bytes(state) / self.weights

    def predicted(self, state: Assignment) -> float | None:
        """This project's sum of the losses; None where a unit has several schemes."""
        by_unit = [{state.get(name, UNQUANTIZED) for name in unit.ops} for unit in self.units]
        if any(len(schemes) > 1 for schemes in by_unit):
            return None
        return loss_of(tuple(scheme for (scheme,) in by_unit), self.units)[0]

    def sizes(self, found: Iterable[Found]) -> dict[str, int]:
        """The bytes of each budget, and no more than the choice of any rival for the budget takes."""
        choices = [of_count["choices"] for of_rival in found for of_count in of_rival.values()]
        return {
            str(bits): min([self.budget(bits), *(self.bytes(of_budget[str(bits)]) for of_budget in choices)])
            for bits in BITS
        }

    def by_ours(self, found: Found, passages: int) -> list[Method]:
        return [
            Method(name, float(bits), state, None, passages, of_method["seconds"])
            for name, of_method in found.items()
            for bits, state in of_method["choices"].items()
        ]

    def by_rival(self, name: str, found: Found, partners: Partners) -> list[Method]:
        """A rival's choices, each next to this project's for the same budget."""
        methods = []
        for count, of_count in found.items():
            for bits, state in of_count["choices"].items():
                if strange := set(state) - set(self.names):
                    raise InputError(f"{name} quantized {min(strange)}, which cannot be decided here")
                partner = partners[float(bits)]
                methods.append(Method(name, float(bits), state, partner, int(count), of_count["seconds"]))
        return methods

    def by_rules(self, partners: Partners) -> list[Method]:
        """Choices without scores, each next to this project's for the same budget."""
        found = [(f"all {scheme}", None, uniform(self.units, scheme)) for scheme in CANDIDATES]
        for bits in BITS:
            budget = self.budget(bits)
            found.append(("first and last layers", bits, edges_first(self.units, budget)))
            found += [(f"random {seed}", bits, at_random(self.units, budget, seed)) for seed in range(SEEDS)]
        return [Method(name, bits, self.state(choice), partners.get(bits)) for name, bits, choice in found]


def ours(loaded: Loaded, space: Space, sizes: Mapping[str, int]) -> Found:
    """This project's choices for so many bytes, refined and not; the two candidates alone are scored for them again.

    Raises:
        InputError: the scores give other choices than those of the run.
    """
    plan = loaded.run.plan
    ops = tuple(replace(op, schemes=tuple(name for name in op.schemes if name in CANDIDATES)) for op in plan.ops)
    plan = replace(plan, ops=ops, schemes={name: plan.schemes[name] for name in CANDIDATES})

    def score(task: Path, made: Path) -> None:
        model, batches, scales = loaded.model(), loaded.batches(), loaded.scales_of_batches()
        started = time.process_time()
        with TemporaryDirectory() as folder, cli.progress_bar("scores") as on_progress:
            store, of_all = ScoreStore(Path(folder)), loaded.scales[ALL_BATCHES]
            capture, _ = capture_sensitivity(
                model,
                batches[: plan.confidence_batches],
                plan,
                store,
                scales,
                on_progress,
                of_all=of_all,
                exact=loaded.run.capture.effort.exact,
                candidates=CANDIDATES,
            )
            units = options_of(plan, capture, CANDIDATES, DecideSpec())[1]
            first = {bits: allocate(units, size) for bits, size in sizes.items()}
            scored = time.process_time() - started
            with HeldOut(model, plan, of_all, [], [], store) as heldout:
                refinement = Refinement(units, heldout, batches[:REFINE])
                refined = {bits: refinement.refined(choice, Budget(sizes[bits])) for bits, choice in first.items()}
            seconds = {UNREFINED: scored, OURS: time.process_time() - started}
        choices = {UNREFINED: first, OURS: refined}
        write_json(made, {name: of_method(choices[name], seconds[name]) for name in choices})

    def of_method(choices: Mapping[str, Choice], seconds: float) -> dict[str, Any]:
        return {"choices": {bits: space.state(choice) for bits, choice in choices.items()}, "seconds": seconds}

    task = {"plan": digest_of_record(plan), "exact": loaded.run.capture.effort.exact, "sizes": dict(sizes)}
    found = kept("ours", task | {"refine": REFINE, "code": CODE}, score)
    if found[UNREFINED]["choices"] != {bits: space.state(allocate(space.units, size)) for bits, size in sizes.items()}:
        raise InputError("the scores of the candidates alone give other choices than the capture of the run")
    return found


def rivals_choices(rival: str, loaded: Loaded) -> Found:
    """A rival's choices, made in its own environment."""
    task = {"snapshot": str(loaded.directory), "bits": list(BITS), "counts": COUNTS[rival], **text_of(rival, loaded)}

    def choose(of: Path, made: Path) -> None:
        script = Path(__file__).with_name(f"rival_{rival}.py")
        command = [environment(rival), script, of, made]
        run(command, FOLDER / f"{rival}.log")

    return kept(rival, task, choose)


def text_of(rival: str, loaded: Loaded) -> dict[str, Any]:
    """The samples of a rival: the calibration passages, and for ModelOpt's 128 the held-out ones that judge nothing.

    These are cut in three, so that there are 128: 16,384 tokens.
    """
    options, calibration = loaded.run.options, loaded.run.calibration
    passages = load_samples(options.calibration_set, calibration, loaded.processor, "calibration")
    if rival == "auto_round":
        return {"texts": [passage.sample.prompt for passage in passages]}
    others = load_samples(options.heldout_set, calibration, loaded.processor, "heldout")[HELDOUT:]
    ids = [list(passage.input_ids) for passage in passages]
    for other in others:
        ends = [len(other.input_ids) * part // PARTS for part in range(PARTS + 1)]
        ids += [list(other.input_ids[start:end]) for start, end in pairwise(ends)]
    return {"calibrate": CALIBRATE, "samples": ids}


def kept(name: str, task: Mapping[str, Any], make: Callable[[Path, Path], None]) -> Found:
    """What was made of the same task before, or is made now."""
    of, made = FOLDER / f"{name}.task.json", FOLDER / f"{name}.choices.json"
    if not (of.exists() and made.exists() and read_json(of) == task):
        made.unlink(missing_ok=True)
        write_json(of, task)
        make(of, made)
    found: Found = read_json(made)
    return found


def environment(rival: str) -> Path:
    """The Python of a rival's virtual environment, which is made at the first call."""
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in ("torch", "transformers")]
    folder, wanted = FOLDER / rival, "\n".join([*pins, *PACKAGES[rival]])
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not (installed.exists() and installed.read_text() == wanted):
        log = FOLDER / f"{rival}.pip.log"
        run([sys.executable, "-m", "venv", "--clear", folder], log)
        run([python, "-m", "pip", "install", "--disable-pip-version-check", *pins, *PACKAGES[rival]], log)
        installed.write_text(wanted)
    return python


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run a command with one thread, its output in a log.

    Raises:
        InputError: the command failed; the message names the log.
    """
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings)
    if ended.returncode:
        raise InputError(f"{' '.join(map(str, command[:3]))} ... failed; see {log}")


def judged(loaded: Loaded, space: Space, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """A row for each method: the held-out KL of its choice, and how much more this is than its partner's."""
    states = [state for method in methods for state in (method.state, method.partner) if state is not None]
    states = list({frozenset(state.items()): state for state in states}.values())
    batches, answers = loaded.heldout(HELDOUT)
    scales, store = loaded.scales[ALL_BATCHES], ScoreStore(FOLDER / "scores")
    done = iter(range(1, len(states) * HELDOUT + 1))
    with cli.progress_bar("held-out passages") as show:
        heldout = HeldOut(
            loaded.model(),
            loaded.run.plan,
            scales,
            batches,
            answers,
            store,
            lambda: show(next(done), len(states) * HELDOUT),
        )
        with heldout:
            found = dict(zip((frozenset(state.items()) for state in states), heldout.measure(states), strict=True))
    rows = []
    for method in methods:
        row = {"method": method.name, "budget": method.budget, "samples": method.samples, "seconds": method.seconds}
        measured = found[frozenset(method.state.items())]
        row |= {"bits": space.bits(method.state), "predicted": space.predicted(method.state)} | measured
        if method.partner is not None:
            partner = found[frozenset(method.partner.items())]
            more = [
                mine - theirs
                for mine, theirs in zip(row["divergence_by_sample"], partner["divergence_by_sample"], strict=True)
            ]
            low, high = interval(more, [1.0] * len(more))
            row |= {"partner_bits": space.bits(method.partner)}
            row |= {"more": sum(more) / len(more), "more_low": low, "more_high": high}
        rows.append(row | {"state": method.state})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, one table for each budget and one for the choices without a budget."""
    lines = []
    for budget, of_budget in groupby(sorted(rows, key=lambda row: row["budget"] or 0), key=lambda row: row["budget"]):
        lines += ["", f"At {budget} bits:" if budget else "Without a budget:", ""]
        lines.append(
            "| method | samples scored | CPU seconds | bits | KL by this project's scores | held-out KL |"
            " 95 % interval | this project's bits | more than this project |"
        )
        lines.append("|---|---:|---:|---:|---:|---:|---|---:|---|")
        for row in sorted(of_budget, key=lambda row: row["divergence"]):
            lines.append(f"| {' | '.join(cells(row))} |")
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    found = [row["method"], str(row["samples"] or ""), f"{row['seconds']:.0f}" if row["seconds"] else ""]
    found += [f"{row['bits']:.4f}", "" if row["predicted"] is None else f"{row['predicted']:.4f}"]
    found += [f"{row['divergence']:.4f}", f"{row['divergence_low']:.4f} to {row['divergence_high']:.4f}"]
    if "more" not in row:
        return [*found, "", ""]
    return [
        *found,
        f"{row['partner_bits']:.4f}",
        f"{row['more']:+.4f} ({row['more_low']:+.4f} to {row['more_high']:+.4f})",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
