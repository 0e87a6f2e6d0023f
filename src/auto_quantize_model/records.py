"""The records that one room hands to the next. This module alone reads, checks and digests them.

In: the body of a document (`documents`), which is JSON. Out: frozen dataclasses. A record is written as the JSON of its
fields, in their order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from auto_quantize_model.documents import Document, make_again
from auto_quantize_model.files import InputError, digest_of

Record = TypeVar("Record")
# For the records that are read: an unknown field is an error, also in nested records.
closed = with_config(ConfigDict(extra="forbid"))


@dataclass(frozen=True)
class SnapshotFile:
    """A file of a snapshot; `name` is its path in the snapshot."""

    name: str
    bytes: int
    sha256: str


@closed
@dataclass(frozen=True, kw_only=True)
class ModelManifest:
    """A checked snapshot. Rules hand the manifest on, in place of the weights.

    Attributes:
        model: its name in result paths.
        source: where it came from, `digits`, `smollm2`, `local` or `hub`.
        path: the snapshot's directory.
        architecture: the class of transformers.
        stand_in: the text of a stand-in's `stand_in.json`, None for any other snapshot.
        rounded: the text of `rounded.json`, which says how the weights were rounded before; None without that file.
        files: all its files.
        digest: of `files` alone, so the same weights have the same digest wherever they lie.
        details: facts that the source adds, such as the training split, as JSON.
    """

    model: str
    source: str
    path: str
    architecture: str
    stand_in: str | None
    rounded: str | None
    files: tuple[SnapshotFile, ...]
    digest: str
    details: dict[str, Any]


@dataclass(frozen=True)
class SampleEntry:
    """A sample of a calibration set, by its hashes and its numbers of tokens.

    Attributes:
        id: the sample's name in its source.
        sha256: over the words and the stored RGB pixels.
        tokens_sha256: over the token ids and the answer's position.
        tokens: in all; `image_tokens` are those of the image.
        answer_tokens: 0 where the answer's tokens are unknown, None without an answer.
    """

    id: str
    sha256: str
    tokens_sha256: str
    tokens: int
    image_tokens: int
    answer_tokens: int | None


@dataclass(frozen=True)
class Answers:
    """How many samples have an answer, and how many have an answer whose tokens are known."""

    given: int
    located: int


@closed
@dataclass(frozen=True, kw_only=True)
class CalibrationManifest:
    """The samples of a calibration set, and how they were drawn.

    Attributes:
        calibration: the set's name in result paths.
        source: `digits`, `local` or `hub`; `path` and `source_digest` are a local source's.
        seed: of the draw.
        samples: of each split, `calibration` and `heldout`.
        limits: {min_pixels, max_pixels, max_tokens} of a sample.
        batch_size: samples in a batch, and `heldout_batch_size` held-out samples in a batch.
        format: `chat` or `plain`.
        image_backend: what decodes and resizes images; None for a model without images.
        text_only: whether no calibration sample has an image.
        answers: of each split.
        digest: of samples, limits, batch_size and format.
        details: facts that the source adds, such as skipped files, as JSON.
    """

    calibration: str
    source: str
    path: str | None
    source_digest: str | None
    seed: int
    samples: dict[str, tuple[SampleEntry, ...]]
    limits: dict[str, int]
    batch_size: int
    heldout_batch_size: int
    format: str
    image_backend: str | None
    text_only: bool
    answers: dict[str, Answers]
    digest: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """How INC quantizes the weight or the activations of an op.

    `observer` holds the arguments of torch's observer: {name, dtype, qscheme, reduce_range, quant_min, quant_max}.
    """

    observer: dict[str, Any]
    dtype: str = ""
    scheme: str = ""
    granularity: str = ""
    algorithm: str = ""


@dataclass(frozen=True)
class IncInt8:
    """The scheme `inc_int8` of one op: INC's name of the op, the class that INC makes of the op, and its two sides."""

    inc_name: str
    pattern: str
    activation: Side
    weight: Side


@dataclass(frozen=True)
class Op:
    """An op of the inventory.

    Attributes:
        op_name: the name of its module.
        op_type: `Linear`, `Conv1d`, `Conv2d`, `Conv3d` or `Embedding`, in INC's spelling. `Experts` is the same matrix
            of all experts of a block.
        shape: of its weight; for `Experts` the number of experts comes first.
        weight_bytes: of its weight in FP32.
        executions: how often the op runs in FP32 on each scored batch.
        tower: `vision`, `language` or `audio`.
        unit: one name for the ops that share a scheme; an op of its own has its own name. A serving engine holds such
            ops as one matrix, or as the experts of one block.
        expert: whether the op is a matrix of one expert among several.
        active: the share of the experts of its block that a token takes; 1 for any other op.
        inc_int8: what INC plans for the op; None where INC planned nothing.
        schemes: the names of the schemes that the op can have.
        refused: the other schemes of the plan, each with the reason.
        stored_bytes: {scheme: bytes of the op's weight with its scales in a checkpoint}, for each scheme that can be
            written.
    """

    op_name: str
    op_type: str
    shape: tuple[int, ...]
    weight_bytes: int
    executions: tuple[int, ...]
    tower: str
    unit: str
    inc_int8: IncInt8 | None
    schemes: tuple[str, ...]
    refused: dict[str, str]
    stored_bytes: dict[str, int] = field(default_factory=dict)
    expert: bool = False
    active: float = 1.0

    @property
    def matrix(self) -> str:
        """One name for the ops that share a global scale. An expert has its own in every engine."""
        return self.op_name if self.expert else self.unit

    @property
    def ran(self) -> bool:
        """Whether the op runs on at least one scored batch."""
        return any(self.executions)


@dataclass(frozen=True)
class Unit:
    """Ops that share a scheme, because a serving engine holds them as one matrix or because they share a weight.

    Attributes:
        name: of the unit; an op alone has the op's name.
        ops: the planned ops, in the plan's order.
        tied: whether they share one weight.
        schemes: those of compressed-tensors that the whole unit can have.
        refused: the others, each with the reason.
    """

    name: str
    ops: tuple[str, ...]
    tied: bool
    schemes: tuple[str, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class Excluded:
    """A module that the plan leaves in FP32, and why."""

    op_name: str
    op_type: str
    reason: str


# `class` is a published key, so this cannot be a dataclass.
LeftOut = TypedDict(
    "LeftOut", {"pattern": str, "class": str, "count": int, "weights": int, "bytes": int, "reason": NotRequired[str]}
)


class TowerShare(TypedDict):
    """Weights and multiply-adds of a tower, in all and in planned ops."""

    weights_total: int
    weights_planned: int
    multiply_adds_total: int
    multiply_adds_planned: int


class Coverage(TypedDict):
    """How many weights the planned ops hold; see `models.coverage.cover`."""

    weights_total: int
    weights_planned: int
    weights_kept: int
    share: float
    towers: dict[str, TowerShare]
    left_out: list[LeftOut]


class IncCheck(TypedDict):
    """Whether INC can measure the model; see `inc.plan.check_inc`.

    `status` is `reproduces_fp32`, or `cannot` where the replay alone measures `inc_int8`. It is `no_plan` where nobody
    can measure `inc_int8` exactly, and `not_asked` where `inc_int8` is not among the schemes.
    """

    status: str
    reason: NotRequired[str]


class Keep(TypedDict):
    """What the config keeps in FP32."""

    op_type_dict: dict[str, str]
    op_name_dict: dict[str, str]


@dataclass(frozen=True)
class Output:
    """What the measured op returns, and the words for it.

    Attributes:
        position: what has a row of the output: a `token` or a `sample`, or a `position` of embeddings.
        choice: what the largest channel of a row stands for: a `token` or a `class`. Empty for embeddings, where it
            stands for nothing.
    """

    position: str = "token"
    choice: str = "token"

    @property
    def divergence(self) -> str:
        """How outputs are compared; see `measure.divergence`."""
        return "KL divergence" if self.choice else "cosine distance"

    @property
    def short(self) -> str:
        """The divergence in a word."""
        return "KL" if self.choice else "distance"

    @property
    def unit(self) -> str:
        """The unit of the divergence; a cosine distance has none."""
        return "nats" if self.choice else ""

    @property
    def heading(self) -> str:
        """The divergence with its unit, for a table."""
        return "KL (nats)" if self.choice else "cosine distance"


@closed
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The inventory of a model and the schemes that each op can have.

    Attributes:
        model, model_digest, calibration, calibration_digest, config_digest: what the plan was made for.
        engine: `replay`, `inc` or `auto`.
        confidence_batches: how many calibration batches are scored.
        maps: which maps are measured.
        experts: whether each matrix of an expert is an op, or the same matrix of all experts of a block (`block`).
        keep: what the config keeps in FP32.
        reduce_range: whether activations take 7 bits of 8; `reduce_range_by` says who chose, `inc` or `config`.
        measured_op: the op at whose output the errors are measured.
        output: what the measured op returns.
        head_only: whether the model scales or caps what the measured op returns before it returns its logits.
        fallback_schemes: those in which the map fallback is measured besides `inc_int8`.
        schemes: the schemes that are measured, by name. Those of compressed-tensors have their fields; see
            `schemes.compressed.scheme_of`.
        ops: in INC's order. Without INC they are in the model's order, with the measured op last.
        units: of the ops; serving engines give one scheme to all ops of a unit.
        excluded: the modules that stay in FP32.
    """

    model: str = ""
    model_digest: str = ""
    calibration: str = ""
    calibration_digest: str = ""
    config_digest: str = ""
    engine: str
    confidence_batches: int
    maps: tuple[str, ...]
    experts: str = "each"
    keep: Keep
    reduce_range: bool
    reduce_range_by: str
    measured_op: str
    output: Output = Output()
    head_only: bool = False
    schemes: dict[str, dict[str, Any]]
    fallback_schemes: tuple[str, ...] = ()
    ops: tuple[Op, ...]
    units: tuple[Unit, ...] = ()
    excluded: tuple[Excluded, ...]
    coverage: Coverage
    inc_check: IncCheck
    versions: dict[str, str]

    @property
    def op_names(self) -> list[str]:
        """The names of the ops, in the plan's order."""
        return [op.op_name for op in self.ops]

    @property
    def by_inc_name(self) -> dict[str, str]:
        """{INC's name: op_name}, for the ops that INC planned."""
        return {op.inc_int8.inc_name: op.op_name for op in self.ops if op.inc_int8}

    @property
    def main_scheme(self) -> str:
        """The scheme whose maps head the report: `inc_int8` where it is measured, else the first one."""
        return "inc_int8" if "inc_int8" in self.schemes else next(iter(self.schemes))


@dataclass(frozen=True)
class ObservedRange:
    """The minimum and the maximum that an observer saw, and {percentile: value} where it kept a histogram."""

    minimum: float
    maximum: float
    percentiles: dict[str, float] | None = None


@dataclass(frozen=True)
class OpScales:
    """Scale and zero_point of an op's input and output by one calibration, and what the observers saw.

    A scale is a float32 value. An Embedding has neither, because its input is ids and its output is FP32.
    """

    in_scale: float = 1.0
    in_zero_point: int = 0
    out_scale: float = 1.0
    out_zero_point: int = 0
    input: ObservedRange | None = None
    output: ObservedRange | None = None


METRICS = (
    "mse_value",
    "image_error",
    "text_error",
    "divergence",
    "image_divergence",
    "text_divergence",
    "top1_agreement",
    "router_agreement",
)
# Of one calibration: {op_name: its scales}. An op that did not run has no entry.
Scales = Mapping[str, OpScales]


@dataclass(frozen=True)
class Score:
    """One row of a capture: the error of one state on one batch.

    Attributes:
        batch: its index.
        map: `isolated`, `fallback` or `requantize`; `units` for a unit of several ops, and `all` for the state with
            every op in the scheme.
        scheme: its name.
        op_name: the op that the map scores, or the unit; empty in the map `all`.
        mse_value: INC's **sum** of squared errors at the measured op.
        image_error, text_error: the same sum at the positions of image and of other tokens; None where INC measured.
        divergence: mean over positions, in nats for logits; None where INC measured.
        image_divergence, text_divergence: its sum at the positions of image and of other tokens; None where INC
            measured.
        top1_agreement: share of positions; None where INC measured.
        router_agreement: share of the routers' choices of experts that are those of FP32; None without a router.
    """

    batch: int
    map: str
    scheme: str
    op_name: str
    mse_value: float
    image_error: float | None = None
    text_error: float | None = None
    divergence: float | None = None
    image_divergence: float | None = None
    text_divergence: float | None = None
    top1_agreement: float | None = None
    router_agreement: float | None = None


@dataclass(frozen=True)
class Estimate:
    """The divergence of one op or unit in one scheme, as a mean over positions, estimated by `measure.probes`.

    Attributes:
        standard_error: of the mean over the probes.
        split_half: how far the means of two halves of the probes are apart.
    """

    scheme: str
    op_name: str
    divergence: float
    standard_error: float
    split_half: float


@dataclass(frozen=True)
class Effort:
    """Which scores of the isolated map are measured, and which are estimated.

    Attributes:
        exact: `all`, `none`, or `top:N`, the N ops of each scheme with the largest estimates and those near them.
        probes: how many probes estimate the others; 0 where all are measured.
        reason: what decided, in words.
    """

    exact: str = "all"
    probes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of a capture. `reference` holds what sums are divided by; see `measure.metrics.Reference.totals`."""

    batch: int
    reference: dict[str, float]
    sample_ids: tuple[str, ...] = ()
    tokens: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Arithmetic:
    """Properties of a machine that the bits of a score depend on."""

    device: str
    threads: int
    instruction_set: str
    int8_kernel: str


@dataclass(frozen=True)
class ProbeValues:
    """What one probe gave on one batch: {scheme: {op or unit: two values}}; see `measure.probes.probe`."""

    batch: int
    number: int
    values: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class HeldOutRecord:
    """What one state gave on one held-out batch, under the state's key; see `measure.heldout.record_of`."""

    batch: int
    key: str
    record: dict[str, Any]


@closed
@dataclass(frozen=True, kw_only=True)
class HeldOutPart:
    """What one of several jobs measured on held-out batches.

    Attributes:
        number: of the part, from 1.
        parts: how many jobs share the work.
    """

    number: int
    parts: int
    arithmetic: Arithmetic
    records: tuple[HeldOutRecord, ...]


@closed
@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of several jobs measured of a capture.

    Attributes:
        number: of the part, from 1.
        parts: how many jobs share the work.
        batches: every scored batch with its reference, which each part computes.
        probes: for the parts that estimate.
        scores: for the parts that measure.
    """

    number: int
    parts: int
    arithmetic: Arithmetic
    tf32: bool
    candidates: tuple[str, ...]
    effort: Effort
    batches: tuple[ScoredBatch, ...]
    probes: tuple[ProbeValues, ...] = ()
    scores: tuple[Score, ...] = ()


@closed
@dataclass(frozen=True, kw_only=True)
class Capture:
    """The scores of a plan, one row each.

    Attributes:
        second_pass: of each batch, what INC's second pass of the fallback map gave: {op_name: mse_value}.
        effort: which scores of the isolated map are exact; without all of them, `estimates` has every op and scheme.
        candidates: the schemes in which units of several ops were measured or estimated as well.
    """

    engine: str
    arithmetic: Arithmetic
    tf32: bool
    model: str
    calibration: str
    plan_digest: str
    versions: dict[str, str]
    batches: tuple[ScoredBatch, ...]
    second_pass: tuple[dict[str, float], ...]
    scores: tuple[Score, ...]
    effort: Effort = Effort()
    estimates: tuple[Estimate, ...] = ()
    candidates: tuple[str, ...] = ()

    def of_map(self, label: str, scheme: str = "inc_int8") -> dict[str, list[Score | None]]:
        """{op_name: its score on each batch, None where it did not run}, in the order of the rows."""
        found: dict[str, list[Score | None]] = {}
        for score in self.scores:
            if (score.map, score.scheme) == (label, scheme):
                found.setdefault(score.op_name, [None] * len(self.batches))[score.batch] = score
        return found

    def all_in(self, scheme: str) -> list[Score]:
        """The score of each batch with every op in a scheme that can have the scheme."""
        return [score for score in self.scores if (score.map, score.scheme) == ("all", scheme)]

    def estimates_of(self, scheme: str) -> dict[str, Estimate]:
        """{name of each op and unit: its estimate in a scheme}."""
        return {found.op_name: found for found in self.estimates if found.scheme == scheme}


@closed
@dataclass(frozen=True)
class Audit:
    """What was measured again, and with what result; see `inc.audit.audit_capture`.

    `served` is {scheme: number of values compared} of `measure.served_audit.audit_served`.
    """

    status: str
    by: str
    batch: int | None
    ops: tuple[str, ...]
    maps: tuple[str, ...]
    compared: int
    rank_agreement: dict[str, float | None]
    served: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The schemes that one unit can get in a decision, with their costs; `unquantized` is one of them.

    Attributes:
        name: of the unit, and `ops` its ops.
        weights: how many values its weights have; a tied weight counts once.
        bytes: {scheme: bytes in the checkpoint}.
        loss: {scheme: what the scheme costs the output}, in the unit of `Frontier.loss`.
        error: {scheme: standard error of the loss}, for the losses that are estimates.
        seconds: {scheme: time of its ops} by the config's table; empty without one.
        active: the share of its bytes that a token needs: below 1 for experts.
    """

    name: str
    ops: tuple[str, ...]
    weights: int
    bytes: dict[str, int]
    loss: dict[str, float]
    error: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    active: float = 1.0


@dataclass(frozen=True)
class Point:
    """One choice of schemes, measured on the held-out samples.

    Attributes:
        kind: `frontier` for the best choice within a budget. `uniform`, `random` and `edges` are controls.
        name: of a control, such as the scheme of a uniform choice. On the frontier `refined` for a refined choice, and
            empty otherwise.
        schemes: of each unit of the frontier, in the frontier's order.
        weight_bytes: of all weights of the model in the checkpoint.
        bits: of a weight with its scales, on average over the units.
        predicted: the sum of the units' losses, and `predicted_error` its standard error, 0 without estimates.
        divergence: mean over positions, in nats for logits. `divergence_low` and `divergence_high` are its 95 %
            interval over the samples.
        image_divergence, text_divergence: the same at the positions of image and of other tokens; None without.
        divergence_by_sample: the mean of each sample.
        top1_agreement: share of positions; None for embeddings.
        perplexity: of the answers' tokens, or of all text where samples have no answers; None without such tokens.
        accuracy: share of answers that are right; None without answers.
        answers_lost: how many answers are wrong, and right without quantization; None without answers.
        relative_error: sum of squared errors over the sum of squares of the unquantized output.
        sqnr_db: the same in dB, None for no error; `sqnr_db_lowest` of the batch with the most error.
        seconds: of all units by the config's table of times; None without one.
        active_bytes: of the weights that one token needs; None in a model without experts.
        router_agreement: the share of the routers' choices of experts that stay; None in a model without routers.
    """

    kind: str
    name: str
    schemes: tuple[str, ...]
    weight_bytes: int
    bits: float
    predicted: float
    predicted_error: float
    divergence: float
    divergence_low: float
    divergence_high: float
    image_divergence: float | None
    text_divergence: float | None
    divergence_by_sample: tuple[float, ...]
    top1_agreement: float | None
    perplexity: float | None
    accuracy: float | None
    answers_lost: int | None
    relative_error: float
    sqnr_db: float | None
    sqnr_db_lowest: float | None
    seconds: float | None = None
    active_bytes: int | None = None
    router_agreement: float | None = None


@closed
@dataclass(frozen=True)
class NotMeasured:
    """Nothing was decided; `reason` says why."""

    status: Literal["not_measured"]
    reason: str


@closed
@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The best choices of schemes for growing budgets, and controls, measured on held-out samples.

    Attributes:
        candidates: the schemes that were chosen from.
        loss: what is summed to choose: `divergence`, or `relative_error` where INC measured.
        units: with their options.
        other_bytes: of all weights outside of the units.
        calibration_batches: those that set the scales.
        batches: held-out ones, with so many `samples`, `tokens` and `answers`.
        points: of growing size; the last leaves every unit unquantized.
        controls: uniform schemes, random choices of equal bytes, and the first and last layers first.
    """

    status: Literal["measured"] = "measured"
    device: str
    threads: int
    instruction_set: str
    int8_kernel: str
    candidates: tuple[str, ...]
    loss: str
    units: tuple[Options, ...]
    other_bytes: int
    calibration_batches: int
    batches: int
    samples: int
    tokens: int
    answers: int
    points: tuple[Point, ...]
    controls: tuple[Point, ...]

    @property
    def unquantized(self) -> Point:
        """The point without any quantized unit."""
        return self.points[-1]

    def assignment(self, point: Point) -> dict[str, str]:
        """The state of a point, {op_name: scheme}."""
        return {
            name: scheme
            for unit, scheme in zip(self.units, point.schemes, strict=True)
            if scheme != "unquantized"
            for name in unit.ops
        }


@dataclass(frozen=True)
class Profile:
    """A measured point with a name.

    Attributes:
        point: the choice of schemes, with its metrics.
        assignment: the choice as {op_name: scheme}.
        kept: the planned ops that stay unquantized.
    """

    point: Point
    assignment: dict[str, str]
    kept: tuple[str, ...]


@closed
@dataclass(frozen=True)
class Profiles:
    """Named profiles; see `decide.profiles.build_profiles`.

    Attributes:
        target: what the config asks for.
        profiles: `smallest`, `balanced` and `safest`, as far as they exist.
        missed: {name: why that profile does not exist}.
    """

    target: dict[str, float | int | None]
    profiles: dict[str, Profile]
    missed: dict[str, str]


@dataclass(frozen=True)
class Distance:
    """How far one state is from the unquantized model: divergence, mean over positions, and SQNR in dB.

    `sqnr_db` is that of the measured output; None for no error.
    """

    divergence: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Damage:
    """What a state costs on the calibration batches that were scored, and on held-out ones; None where not measured."""

    calibration: Distance
    heldout: Distance | None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins from `low` to `high`. The outer bins also count what lies beyond."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Channel:
    """An input channel, and how many times its largest magnitude is that of the median channel."""

    index: int
    ratio: float


@dataclass(frozen=True)
class InputFacts:
    """The inputs of a unit on held-out batches.

    Attributes:
        range: minimum and maximum; `calibration_range` is that of all calibration batches.
        image_range, text_range: the same at the positions of images and of other tokens. None without such positions;
            also None where the op's positions are not those of the tokens.
        clipped: the share of values outside of the calibration's range.
        outliers: the channels with the largest ratios, the largest first; `outlier_count` is how many there are.
        histogram: over the calibration's range.
    """

    range: tuple[float, float]
    calibration_range: tuple[float, float]
    image_range: tuple[float, float] | None
    text_range: tuple[float, float] | None
    clipped: float
    outliers: tuple[Channel, ...]
    outlier_count: int
    histogram: Histogram


@dataclass(frozen=True)
class WeightFacts:
    """The weight of a unit, the rows of its ops together.

    Attributes:
        kurtosis: excess kurtosis of all values, 0 for a normal distribution.
        worst_kurtosis: of the row with the highest one: row `worst_row` of the op `worst_op`.
        clipped: the share of values beyond the largest value that their scale can represent.
        histogram: over the range of the weight.
    """

    kurtosis: float
    worst_kurtosis: float
    worst_op: str
    worst_row: int
    clipped: float
    histogram: Histogram


@dataclass(frozen=True)
class Cure:
    """One way to regain a part of the loss of a unit in a scheme.

    Attributes:
        kind: `smoothing`, `mse_weight`, `percentile_inputs`, `asymmetric_inputs`, or `together` for several of them.
        settings: {kind: its setting}, such as a smoothing strength; of `together` those of all its cures.
        reason: why the cure cannot be applied; empty where it was measured.
        damage: of the unit with the cure; None where it cannot be applied.
        regained: how much of the divergence the cure regains on held-out samples, as a mean over them. `low` and `high`
            are its 95 % interval. None where only calibration batches were measured.
        extra_bytes: what the checkpoint stores besides.
        folds_into: the module that takes the smoothing scale up; empty for none.
        at_run_time: what must be computed besides, in words; empty for nothing.
    """

    kind: str
    settings: dict[str, str]
    reason: str = ""
    damage: Damage | None = None
    regained: float | None = None
    low: float | None = None
    high: float | None = None
    extra_bytes: int = 0
    folds_into: str = ""
    at_run_time: str = ""

    @property
    def is_free(self) -> bool:
        """Whether the cure costs neither bytes nor time."""
        return not self.reason and not self.extra_bytes and not self.at_run_time

    @property
    def is_confirmed(self) -> bool:
        """Whether the cure regains something on held-out samples, beyond the interval."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class Cause:
    """Why a unit breaks in a scheme, and what regains its loss. In each state, only this unit is quantized.

    Attributes:
        unit: its name, and `ops` its ops.
        scheme: its name.
        profiles: those in which the unit has the scheme.
        whole: the unit in the scheme; `weight_alone` and `inputs_alone` with one side in the scheme.
        cures: the best setting of each kind, by the calibration batches.
        strengths: {smoothing strength: KL divergence on the calibration batches}, for all that were tried.
        chosen: the kind of the cure that is exported: free, confirmed, and the best of these; empty for none.
    """

    unit: str
    ops: tuple[str, ...]
    scheme: str
    profiles: tuple[str, ...]
    whole: Damage
    weight_alone: Damage
    inputs_alone: Damage
    inputs: InputFacts
    weight: WeightFacts
    cures: tuple[Cure, ...]
    strengths: dict[str, float]
    chosen: str

    @property
    def cure(self) -> Cure | None:
        """The cure that is chosen."""
        return next((cure for cure in self.cures if cure.kind == self.chosen), None)


@dataclass(frozen=True)
class Cured:
    """A profile with cures of its units, on all held-out samples.

    Attributes:
        tried: the units whose cure helps each of them alone.
        units: those whose cures together have the least divergence on the calibration batches; empty where the profile
            without cures has less.
        before: the divergence of the profile; `divergence` with the cures. None without any.
        regained: as a mean over the samples; `low` and `high` are its 95 % interval. None without cures.
    """

    tried: tuple[str, ...]
    units: tuple[str, ...]
    before: float
    divergence: float | None = None
    regained: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def is_confirmed(self) -> bool:
        """Whether the cures regain something on held-out samples, beyond the interval."""
        return self.low is not None and self.low > 0


@closed
@dataclass(frozen=True, kw_only=True)
class Why:
    """Why the worst units break, and what regains their loss at no cost; see `decide.causes.explain`.

    Attributes:
        calibration_batches: those that were scored; `heldout_batches` the held-out ones, with so many samples.
        causes: the largest loss first.
        cured: {profile: the profile with cures}; a profile is absent where no cure helps a unit of it.
        skipped: remarks on what was not explained.
    """

    status: Literal["measured"] = "measured"
    calibration_batches: int
    heldout_batches: int
    heldout_samples: int
    causes: tuple[Cause, ...]
    cured: dict[str, Cured]
    skipped: tuple[str, ...] = ()


def body_of(record: Any) -> dict[str, Any]:
    """A record as the body of a document, with lists in place of tuples, as in JSON."""
    body: dict[str, Any] = asdict(record, dict_factory=_with_lists)
    return body


def _with_lists(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def digest_of_record(record: Any) -> str:
    """SHA-256 of a record's JSON."""
    return digest_of(body_of(record))


def as_record(kind: type[Record], document: Mapping[str, Any]) -> Record:
    """The record that is written in the body of a document.

    Raises:
        InputError: a field is missing, unknown, or has another type. The message names file, field and next step.
    """
    try:
        record: Record = _adapter(kind).validate_python(dict(document))  # type: ignore[arg-type]  # classes hash
        return record
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        place, again = (
            (document.path, make_again(document.kind)) if isinstance(document, Document) else (kind.__name__, "")
        )
        raise InputError(f"{place}: {where}: {first['msg']}; {again or 'correct the value'}") from None


@cache  # a record type is a class or a union of classes
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
