"""The cures of one unit in one scheme: what is tried, what was measured, and which cure is chosen.

In: the unit, its inputs, and a model under replay. Out: the record `Cause`. The best setting of each kind is chosen by
the calibration batches. The held-out batches alone say whether the cure helps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.measure.alone import Alone, Records, distance_of, regained
from auto_quantize_model.measure.why import Inputs, weight_facts
from auto_quantize_model.records import Cause, Cure, Damage, Options, Scales
from auto_quantize_model.replay.altered import Alteration
from auto_quantize_model.schemes.compressed import stored_bytes
from auto_quantize_model.schemes.cures import smoothing_scale

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
        """Of the state with the cure."""
        return in_words(self.settings)


def in_words(settings: Mapping[str, str]) -> str:
    """The settings of a cure as one text."""
    return " ".join(f"{kind} {setting}".strip() for kind, setting in settings.items())


def scheme_with(scheme: str, settings: Mapping[str, str]) -> str:
    """The name of a scheme with a cure, among the schemes of an op."""
    return f"{scheme}, {in_words(settings)}"


class UnitCures:
    """The cures of one unit in one scheme: what is tried, and what was measured.

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
        costs = (0, before, "") if before else (2 * columns, "", f"{MULTIPLIED}, because {reason}")
        return [
            Trial(
                SMOOTHING,
                {SMOOTHING: f"{strength:g}"},
                replace(self.whole, scale=smoothing_scale(self.inputs.low, self.inputs.high, weights, strength)),
                *costs,
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
        return distance_of(self.on_calibration[name]).divergence

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
            own = trial.alteration
            if trial.kind == SMOOTHING:
                alteration = replace(alteration, scale=own.scale)
            elif trial.kind == MSE:
                alteration = replace(alteration, narrow=True)
            else:
                alteration = replace(alteration, inputs=own.inputs)
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

    def cause(self) -> Cause:
        """All that was found."""
        cures = self.cures()
        able = [
            cure
            for cure in cures
            if cure.is_confirmed and not cure.at_run_time and cure.settings.keys() <= EXPORTED and cure.damage
        ]
        best = min(able, key=lambda cure: cure.damage.calibration.divergence, default=None)  # type: ignore[union-attr]
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
