"""Why the worst units break, and which cures regain their loss at no cost.

In: the frontier with its profiles, the model, and its batches. Out: the record `Why`. The best setting of a cure is
chosen by the calibration batches. Only the held-out batches say whether the cure helps.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.measure.alone import Alone, Records, distance_of, regained
from auto_quantize_model.measure.folding import folding_of
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.measure.why import Inputs, watch_inputs, weight_facts
from auto_quantize_model.records import Cause, Cure, Cured, Damage, Frontier, Options, Plan, Profiles, Scales, Why
from auto_quantize_model.replay.altered import Alteration
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.schemes.compressed import stored_bytes
from auto_quantize_model.schemes.cures import smoothing_scale

WORST = 4  # units that are explained in their worst scheme
OF_PROFILE = 3  # units of each profile that are explained in the scheme that they have there
HELDOUT = 8  # held-out batches that say whether a cure of one unit helps
STRENGTHS = (0.3, 0.5, 0.65, 0.8)
PERCENTILES = (("0.1", "99.9"), ("1.0", "99.0"))
SMOOTHING, MSE, PERCENTILE, ASYMMETRIC, TOGETHER = (
    "smoothing",
    "mse_weight",
    "percentile_inputs",
    "asymmetric_inputs",
    "together",
)
EXPORTED = {SMOOTHING, MSE, ASYMMETRIC}  # kinds that a tool takes; see `export.llm_compressor`
MULTIPLIED = "the inputs must be multiplied by a scale"
Progress = Callable[[int, int], None]  # done and total, in forwards
Percentiles = Mapping[str, Mapping[str, float]]  # of each op's inputs in the calibration


@dataclass(frozen=True)
class Subject:
    """A unit in a scheme, to be explained, and the profiles in which the unit has this scheme."""

    unit: Options
    scheme: str
    profiles: tuple[str, ...]

    @property
    def loss(self) -> float:
        return self.unit.loss[self.scheme]

    def state(self, name: str = "") -> dict[str, str]:
        """The unit alone in its scheme, or in an altered one."""
        return dict.fromkeys(self.unit.ops, name or self.scheme)


def subjects_of(plan: Plan, frontier: Frontier, profiles: Profiles) -> list[Subject]:
    """The worst units, each in its worst scheme, and the worst units of each profile; the largest loss first.

    A scheme that a checkpoint holds is left out, because its tool has chosen all ranges already.
    """
    able = {name for name in frontier.candidates if "checkpoint" not in plan.schemes[name]}
    chosen: dict[tuple[str, str], Options] = {}

    def add(pairs: Sequence[tuple[Options, str]], count: int) -> None:
        worst = sorted((pair for pair in pairs if pair[0].loss[pair[1]] > 0), key=lambda pair: -pair[0].loss[pair[1]])
        chosen.update({(unit.name, scheme): unit for unit, scheme in worst[:count]})

    given = {
        name: dict(zip((unit.name for unit in frontier.units), profile.point.schemes, strict=True))
        for name, profile in profiles.profiles.items()
    }
    in_any = [(unit, sorted(able & unit.loss.keys(), key=lambda name: -unit.loss[name])) for unit in frontier.units]
    add([(unit, schemes[0]) for unit, schemes in in_any if schemes], WORST)
    for schemes in given.values():
        add([(unit, schemes[unit.name]) for unit in frontier.units if schemes[unit.name] in able], OF_PROFILE)
    found = [
        Subject(unit, scheme, tuple(name for name, schemes in given.items() if schemes[unit.name] == scheme))
        for (_, scheme), unit in chosen.items()
    ]
    return sorted(found, key=lambda subject: -subject.loss)


@dataclass(frozen=True)
class Trial:
    """A cure with one setting: the name of its altered scheme, the alteration, and what it costs."""

    kind: str
    settings: dict[str, str]
    alteration: Alteration
    extra_bytes: int = 0
    folds_into: str = ""
    at_run_time: str = ""

    @property
    def name(self) -> str:
        return " ".join(f"{kind} {setting}".strip() for kind, setting in self.settings.items())


def explain(
    model: torch.nn.Module,
    plan: Plan,
    frontier: Frontier,
    profiles: Profiles,
    scales: Scales,
    percentiles: Percentiles,
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    store: ScoreStore,
    on_progress: Progress = lambda done, total: None,
) -> Why:
    """Explain the worst units and those of the profiles, and try the cures.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: the plan behind the frontier.
        frontier: of schemes of compressed-tensors.
        profiles: of the frontier.
        scales: of all calibration batches together.
        percentiles: {op: {percentile: value}} of the inputs that the calibration saw.
        calibration: all calibration batches; the first ones were scored.
        heldout: the held-out batches of the frontier.
        store: keeps the record of each forward.
        on_progress: called after each forward.

    Raises:
        InputError: a number is not finite.
    """
    subjects = subjects_of(plan, frontier, profiles)
    few, scored = heldout[:HELDOUT], calibration[: plan.confidence_batches]
    done, total = itertools.count(1), 0

    def on_forward() -> None:
        on_progress(next(done), max(total, 1))

    firsts = list(dict.fromkeys(subject.unit.ops[0] for subject in subjects))
    total = len(calibration) + len(few)
    inputs = watch_inputs(model, firsts, calibration, few, on_forward)
    on_device = {name: tensor.to(next(model.parameters()).device) for name, tensor in calibration[0].items()}
    folds = {
        subject.unit.ops: folding_of(model, subject.unit.ops, plan.measured_op, on_device)
        for subject in subjects
        if subject.unit.ops[0] in inputs
    }
    with Alone(model, plan, scales, store, on_forward) as alone:
        patients = [
            Patient(subject, alone, inputs[subject.unit.ops[0]], folds[subject.unit.ops], scales, percentiles)
            for subject in subjects
            if subject.unit.ops[0] in inputs
        ]
        total += len(scored) * sum(len(patient.states()) for patient in patients)
        measure(patients, alone, scored, lambda patient: patient.states(), lambda patient: patient.on_calibration)
        for patient in patients:
            patient.combine()
        total += len(scored) * sum(patient.together is not None for patient in patients)
        measure(patients, alone, scored, lambda patient: patient.combined(), lambda patient: patient.on_calibration)
        total += len(few) * sum(len(patient.best()) for patient in patients)
        measure(patients, alone, few, lambda patient: patient.best(), lambda patient: patient.on_heldout)
        causes = tuple(patient.cause(model) for patient in patients)
        cured_profiles = {name: cured_state(name, profiles, causes) for name in profiles.profiles}
        states = {name: state for name, state in cured_profiles.items() if state}
        total += len(heldout) * len(states)
        cured = {
            name: cured_of(name, profiles, causes, records) for name, records in alone.measure(heldout, states).items()
        }
    return Why(
        calibration_batches=len(scored),
        heldout_batches=len(few),
        heldout_samples=sum(len(batch["input_ids"]) for batch in few),
        causes=causes,
        cured=cured,
        skipped=skipped(plan, frontier),
    )


def skipped(plan: Plan, frontier: Frontier) -> tuple[str, ...]:
    """What is not explained."""
    names = [name for name in frontier.candidates if "checkpoint" in plan.schemes[name]]
    return tuple(f"{name} is the scheme of a checkpoint, whose tool has chosen its ranges" for name in names)


def measure(
    patients: Sequence["Patient"],
    alone: Alone,
    batches: Sequence[Batch],
    states: Callable[["Patient"], Mapping[str, dict[str, str]]],
    into: Callable[["Patient"], dict[str, Records]],
) -> None:
    """Measure the states of all patients batch by batch, and give each patient its records."""
    wanted = {
        f"{number} {name}": state for number, patient in enumerate(patients) for name, state in states(patient).items()
    }
    for name, records in alone.measure(batches, wanted).items():
        number, _, own = name.partition(" ")
        into(patients[int(number)])[own] = records


class Patient:
    """One unit in one scheme: what is tried, and what was measured.

    Args:
        subject: the unit and the scheme.
        alone: measures; it gets the altered schemes of the unit.
        inputs: of the unit.
        fold: the module that takes a smoothing scale up, and otherwise the reason why there is none.
        scales: of all calibration batches.
        percentiles: of the calibration.

    Attributes:
        on_calibration, on_heldout: {state: its records}.
    """

    def __init__(
        self,
        subject: Subject,
        alone: Alone,
        inputs: Inputs,
        fold: tuple[str, str],
        scales: Scales,
        percentiles: Percentiles,
    ) -> None:
        self.subject, self.alone, self.inputs, self.fold = subject, alone, inputs, fold
        self.scheme: QuantizationScheme = alone.schemes[subject.scheme]
        self.modules = {name: alone.replay.sites[name].module for name in subject.unit.ops}
        seen = scales[subject.unit.ops[0]].input
        self.whole = Alteration(
            self.scheme.weights,
            self.scheme.input_activations,
            ends=(seen.minimum, seen.maximum) if seen else None,
            channels=(inputs.low, inputs.high),
        )
        self.percentiles = percentiles.get(subject.unit.ops[0], {})
        self.refused: dict[str, str] = {}
        self.trials: dict[str, Trial] = {trial.name: trial for trial in (*self.smoothings(), *self.others())}
        self.together: Trial | None = None
        self.on_calibration: dict[str, Records] = {}
        self.on_heldout: dict[str, Records] = {}
        sides = {"weight alone": replace(self.whole, inputs=None), "inputs alone": replace(self.whole, weights=None)}
        self.add(sides | {name: trial.alteration for name, trial in self.trials.items()})

    def add(self, alterations: Mapping[str, Alteration]) -> None:
        """Give the unit altered schemes."""
        self.alone.add(self.subject.unit.ops, {self.scheme_named(name): value for name, value in alterations.items()})

    def scheme_named(self, name: str) -> str:
        """The name of an altered scheme of this unit."""
        return f"{self.subject.scheme}, {name}"

    def smoothings(self) -> list[Trial]:
        """SmoothQuant with each strength. Without a module that takes the scale up, the scale costs bytes and time."""
        before, reason = self.fold
        weights = [module.weight for module in self.modules.values()]
        columns = weights[0].shape[1]
        cost = (
            {"folds_into": before}
            if before
            else {"extra_bytes": 2 * columns, "at_run_time": f"{MULTIPLIED}, because {reason}"}
        )
        return [
            Trial(
                SMOOTHING,
                {SMOOTHING: f"{strength:g}"},
                replace(self.whole, scale=smoothing_scale(self.inputs.low, self.inputs.high, weights, strength)),
                **cost,  # type: ignore[arg-type]
            )
            for strength in STRENGTHS
        ]

    def others(self) -> list[Trial]:
        """The cures that change ranges. Those that the scheme cannot have get a reason."""
        found = [Trial(MSE, {MSE: ""}, replace(self.whole, narrow=True))]
        args = self.scheme.input_activations
        if args is None:
            self.refused |= dict.fromkeys((PERCENTILE, ASYMMETRIC), "the scheme does not quantize inputs")
            return found
        if args.dynamic:
            own = "each input has its own scale" if args.dynamic is True else "each group of an input has its own scale"
            self.refused[PERCENTILE] = f"{own}, so the calibration sets no range"
        elif not all(key in self.percentiles for pair in PERCENTILES for key in pair):
            self.refused[PERCENTILE] = "the calibration kept no percentiles of these inputs"
        else:
            for low, high in PERCENTILES:
                ends = self.percentiles[low], self.percentiles[high]
                found.append(Trial(PERCENTILE, {PERCENTILE: high}, replace(self.whole, ends=ends)))
        if args.type != "int":
            self.refused[ASYMMETRIC] = "floating-point values have no zero_point"
        elif not args.symmetric:
            self.refused[ASYMMETRIC] = "the scheme's inputs are asymmetric already"
        else:
            shifted = args.model_copy(update={"symmetric": False})
            trial = Trial(ASYMMETRIC, {ASYMMETRIC: ""}, replace(self.whole, inputs=shifted))
            found.append(replace(trial, extra_bytes=self.more_bytes(trial.alteration)))
        return found

    def more_bytes(self, alteration: Alteration) -> int:
        """How many bytes more a checkpoint stores with an alteration of the scheme."""
        altered = self.scheme.model_copy(update={"input_activations": alteration.inputs})
        shapes = [tuple(module.weight.shape) for module in self.modules.values()]
        return sum(stored_bytes(altered, shape) - stored_bytes(self.scheme, shape) for shape in shapes)

    def states(self) -> dict[str, dict[str, str]]:
        """What is measured on the calibration batches: the whole, each side alone, and each trial."""
        names = ["weight alone", "inputs alone", *self.trials]
        return {"whole": self.subject.state()} | {name: self.subject.state(self.scheme_named(name)) for name in names}

    def kl(self, name: str) -> float:
        """The divergence of a state on the calibration batches."""
        return distance_of(self.on_calibration[name]).kl_divergence

    def best_trials(self) -> dict[str, Trial]:
        """Of each kind the setting with the least divergence on the calibration batches."""
        found: dict[str, Trial] = {}
        for trial in sorted(self.trials.values(), key=lambda trial: self.kl(trial.name)):
            found.setdefault(trial.kind, trial)
        return {kind: found[kind] for kind in (SMOOTHING, MSE, PERCENTILE, ASYMMETRIC) if kind in found}

    def combine(self) -> None:
        """Put the cures together that cost no time, that a tool takes, and that help on the calibration batches."""
        helping = [
            trial
            for kind, trial in self.best_trials().items()
            if kind in EXPORTED and not trial.at_run_time and self.kl(trial.name) < self.kl("whole")
        ]
        if len(helping) < 2:
            return
        alteration = self.whole
        for trial in helping:
            changes = {SMOOTHING: {"scale": trial.alteration.scale}, MSE: {"narrow": True}}
            alteration = replace(alteration, **changes.get(trial.kind, {"inputs": trial.alteration.inputs}))
        self.together = Trial(
            TOGETHER,
            {kind: setting for trial in helping for kind, setting in trial.settings.items()},
            alteration,
            sum(trial.extra_bytes for trial in helping),
            "".join(trial.folds_into for trial in helping),
        )
        self.add({self.together.name: alteration})

    def combined(self) -> dict[str, dict[str, str]]:
        """The state with several cures."""
        if self.together is None:
            return {}
        return {self.together.name: self.subject.state(self.scheme_named(self.together.name))}

    def best(self) -> dict[str, dict[str, str]]:
        """What is measured on held-out batches: the whole, each side alone, and the best trial of each kind."""
        names = {"whole", "weight alone", "inputs alone", *(trial.name for trial in self.best_trials().values())}
        return {name: state for name, state in self.states().items() if name in names} | self.combined()

    def damage(self, name: str) -> Damage:
        """What a state costs."""
        return Damage(distance_of(self.on_calibration[name]), distance_of(self.on_heldout[name]))

    def cures(self) -> tuple[Cure, ...]:
        """Each kind of cure with its best setting, or with the reason why it cannot be applied."""
        best = self.best_trials() | ({TOGETHER: self.together} if self.together else {})
        found = []
        for kind in (SMOOTHING, MSE, PERCENTILE, ASYMMETRIC, TOGETHER):
            if kind in self.refused:
                found.append(Cure(kind, {}, self.refused[kind]))
            elif trial := best.get(kind):
                change = regained(self.on_heldout["whole"], self.on_heldout[trial.name])
                costs = trial.extra_bytes, trial.folds_into, trial.at_run_time
                found.append(Cure(kind, trial.settings, "", self.damage(trial.name), *change, *costs))
        return tuple(found)

    def cause(self, model: torch.nn.Module) -> Cause:
        """All that was found."""
        cures = self.cures()
        able = [
            cure
            for cure in cures
            if cure.is_confirmed and not cure.at_run_time and cure.settings.keys() <= EXPORTED and cure.damage
        ]
        best = min(able, key=lambda cure: cure.damage.calibration.kl_divergence, default=None)  # type: ignore[union-attr]
        strengths = [trial for trial in self.trials.values() if trial.kind == SMOOTHING]
        return Cause(
            unit=self.subject.unit.name,
            ops=self.subject.unit.ops,
            scheme=self.subject.scheme,
            profiles=self.subject.profiles,
            whole=self.damage("whole"),
            weight_alone=self.damage("weight alone"),
            inputs_alone=self.damage("inputs alone"),
            inputs=self.inputs.facts(),
            weight=weight_facts({name: module.weight for name, module in self.modules.items()}, self.scheme),
            cures=cures,
            strengths={trial.settings[SMOOTHING]: self.kl(trial.name) for trial in strengths},
            chosen=best.kind if best else "",
        )


def cured_state(name: str, profiles: Profiles, causes: Sequence[Cause]) -> dict[str, str]:
    """The state of a profile with the chosen cures of its units; empty where there is none."""
    state = dict(profiles.profiles[name].assignment)
    chosen = [(cause, cause.cure) for cause in causes if name in cause.profiles]
    for cause, cure in chosen:
        if cure:
            altered = Trial(cure.kind, cure.settings, Alteration(None, None)).name
            state |= dict.fromkeys(cause.ops, f"{cause.scheme}, {altered}")
    return state if any(cure for _, cure in chosen) else {}


def cured_of(name: str, profiles: Profiles, causes: Sequence[Cause], records: Records) -> Cured:
    """A profile with its cures, compared with the profile itself."""
    point = profiles.profiles[name].point
    values = iter(point.kl_by_sample)
    before = [{**record, "divergences": [next(values) for _ in record["divergences"]]} for record in records]
    units = tuple(cause.unit for cause in causes if name in cause.profiles and cause.chosen)
    return Cured(units, distance_of(records).kl_divergence, point.kl_divergence, *regained(before, records))
