"""Small records for tests: each field that a test does not name has a plain value."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from auto_quantize_model.models.units import tower_of
from auto_quantize_model.records import (
    Answers,
    Arithmetic,
    Audit,
    CalibrationManifest,
    Capture,
    Cause,
    Channel,
    Cure,
    Cured,
    Damage,
    Distance,
    Effort,
    Estimate,
    Excluded,
    Frontier,
    Histogram,
    IncInt8,
    InputFacts,
    ModelManifest,
    Op,
    Options,
    Plan,
    Point,
    Profile,
    Profiles,
    SampleEntry,
    Score,
    ScoredBatch,
    Side,
    Unit,
    WeightFacts,
    Why,
    digest_of_record,
)

ACTIVATION = {
    "name": "HistogramObserver",
    "dtype": "quint8",
    "qscheme": "per_tensor_affine",
    "reduce_range": False,
    "quant_min": None,
    "quant_max": None,
}
WEIGHT = ACTIVATION | {"name": "PerChannelMinMaxObserver", "dtype": "qint8", "qscheme": "per_channel_symmetric"}
EMBEDDING = WEIGHT | {"dtype": "quint8", "qscheme": "per_channel_affine_float_qparams"}
ARITHMETIC = Arithmetic("cpu", 1, "AVX2", "saturating")
COVERAGE: Any = {
    "weights_total": 8,
    "weights_planned": 8,
    "weights_kept": 0,
    "share": 1.0,
    "towers": {},
    "left_out": [],
}


def a_model_manifest(**changes: Any) -> ModelManifest:
    """The manifest of a model without files."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "source": "local",
        "path": "models/tiny",
        "architecture": "Qwen2_5_VL",
        "stand_in": None,
        "rounded": None,
        "files": (),
        "digest": "0" * 64,
        "details": {},
    }
    return ModelManifest(**fields | changes)


def a_calibration_manifest(**changes: Any) -> CalibrationManifest:
    """The manifest of a set of two calibration samples with an image and an answer."""
    sample = SampleEntry("a|b", "1" * 64, "3" * 64, tokens=24, image_tokens=4, answer_tokens=1)
    fields: dict[str, Any] = {
        "calibration": "set",
        "source": "local",
        "path": "set.jsonl",
        "source_digest": "4" * 64,
        "seed": 0,
        "samples": {"calibration": (sample, sample), "heldout": ()},
        "limits": {"min_pixels": 3136, "max_pixels": 3136, "max_tokens": 64},
        "batch_size": 1,
        "heldout_batch_size": 1,
        "format": "chat",
        "image_backend": "pil",
        "text_only": False,
        "answers": {"calibration": Answers(2, 2), "heldout": Answers(0, 0)},
        "digest": "2" * 64,
        "details": {},
    }
    return CalibrationManifest(**fields | changes)


# What `inc.plan.identify` takes besides the plan.
IDENTITY = (a_model_manifest(), a_calibration_manifest(), "2")


def an_op(name: str, op_type: str = "Linear", *, executions: Sequence[int] = (1,), **changes: Any) -> Op:
    """An op as INC plans it; `pattern`, `activation` and `weight` (observers) are those of its scheme."""
    weight = changes.pop("weight", EMBEDDING if op_type == "Embedding" else WEIGHT)
    scheme = IncInt8(
        inc_name=name,
        pattern=changes.pop("pattern", op_type),
        activation=Side(changes.pop("activation", ACTIVATION)),
        weight=Side(weight),
    )
    fields: dict[str, Any] = {"shape": (2, 2), "weight_bytes": 16, "tower": tower_of(name), "unit": name}
    fields |= {"schemes": ("inc_int8",), "refused": {}, **changes}
    fields.setdefault("stored_bytes", {"inc_int8": fields["weight_bytes"] // 4})
    return Op(op_name=name, op_type=op_type, executions=tuple(executions), inc_int8=scheme, **fields)


def a_plan(ops: Iterable[Op | str] = (), **changes: Any) -> Plan:
    """A plan of ops, given as records or by name, that measures at the last of them."""
    found = tuple(op if isinstance(op, Op) else an_op(op) for op in ops)
    excluded = [
        module if isinstance(module, Excluded) else Excluded(module, "LayerNorm", "a test")
        for module in changes.pop("excluded", ())
    ]
    fields: dict[str, Any] = {
        "model": "tiny",
        "calibration": "set",
        "engine": "replay",
        "confidence_batches": len(found[0].executions) if found else 1,
        "maps": ("isolated",),
        "keep": {"op_type_dict": {}, "op_name_dict": {}},
        "reduce_range": True,
        "reduce_range_by": "inc",
        "schemes": {"inc_int8": {}},
        "measured_op": found[-1].op_name if found else "lm_head",
        "coverage": COVERAGE,
        "inc_check": {"status": "reproduces_fp32"},
        "versions": {"torch": "2.13.0"},
        "units": tuple(Unit(op.op_name, (op.op_name,), False, op.schemes[1:], op.refused) for op in found),
    }
    return Plan(ops=found, excluded=tuple(excluded), **fields | changes)


def a_score(mse_value: float, **metrics: float) -> Score:
    """A score of one op in the isolated map of the first batch."""
    return Score(0, "isolated", "inc_int8", "op", mse_value, **metrics)


def a_capture(
    plan: Plan,
    scores: Mapping[str, Mapping[str, Sequence[Mapping[str, float] | None]]],
    all_int8: Sequence[Mapping[str, float]],
    **changes: Any,
) -> Capture:
    """A capture of a plan: {map: {op: a record per batch, None where the op did not run}}."""
    rows = [
        Score(batch, label, "inc_int8", name, **record)
        for batch in range(len(all_int8))
        for label, ops in scores.items()
        for name, records in ops.items()
        if (record := records[batch]) is not None
    ]
    rows += [Score(batch, "all", "inc_int8", "", **record) for batch, record in enumerate(all_int8)]
    fields: dict[str, Any] = {
        "engine": plan.engine,
        "arithmetic": ARITHMETIC,
        "tf32": False,
        "model": plan.model,
        "calibration": plan.calibration,
        "plan_digest": digest_of_record(plan),
        "versions": plan.versions,
        "batches": tuple(
            ScoredBatch(index, POSITIONS | {"all": 1000.0, "image": 200.0, "text": 800.0}, ("a|b",), 24, 4)
            for index in range(len(all_int8))
        ),
        "second_pass": tuple({} for _ in all_int8),
    }
    return Capture(scores=tuple(rows), **fields | changes)


POSITIONS = {"image_positions": 4.0, "text_positions": 20.0}
KL_OF_SCHEMES = {
    "inc_int8": {"a": 3.0, "b": 2.0, "c": 1.0},
    "W8A8": {"a": 1.0, "b": 2.0, "c": 3.0},
    "NVFP4": {"a": 5.0, "c": 1.0},
}


def three_schemes() -> tuple[Plan, Capture]:
    """Three ops in three schemes; `b` cannot have NVFP4."""
    able = {name: tuple(scheme for scheme, ops in KL_OF_SCHEMES.items() if name in ops) for name in "abc"}
    refused = {"b": {"NVFP4": "its 8 columns do not divide"}}
    ops = [an_op(name, schemes=schemes, refused=refused.get(name, {})) for name, schemes in able.items()]
    plan = a_plan(ops, schemes=dict.fromkeys(KL_OF_SCHEMES, {}), config_digest="3" * 64)
    scores: list[Score] = []
    for scheme, values in KL_OF_SCHEMES.items():
        record: dict[str, Any] = {"text_error": 1.0, "image_error": 0.0, "top1_agreement": 0.5}
        scores += [Score(0, "isolated", scheme, name, 10 - kl, divergence=kl, **record) for name, kl in values.items()]
        scores.append(Score(0, "all", scheme, "", 9.0, divergence=sum(values.values()), **record))
    return plan, replace(a_capture(plan, {}, [{"mse_value": 1.0}]), scores=tuple(scores))


def with_estimates() -> tuple[Plan, Capture]:
    """The three schemes with one measured op in each, the first, and estimates of all ops."""
    plan, capture = three_schemes()
    scores = tuple(score for score in capture.scores if score.map != "isolated" or score.op_name == "a")
    estimates = tuple(
        Estimate(scheme, name, kl / 2, 0.25, 0.5) for scheme, ops in KL_OF_SCHEMES.items() for name, kl in ops.items()
    )
    return plan, replace(capture, scores=scores, effort=Effort("top:1", 16, "a test"), estimates=estimates)


def an_audit(**changes: Any) -> Audit:
    """An audit that found no difference."""
    fields: dict[str, Any] = {"status": "bit_identical", "by": "inc", "batch": 0, "ops": ("lm_head",)}
    fields |= {"maps": ("isolated",), "compared": 1, "rank_agreement": {}}
    return Audit(**fields | changes)


def options(name: str, **costs: tuple[int, float]) -> Options:
    """A unit of one op with {scheme: (bytes, loss)}; unquantized takes 16 bytes for its 8 weights."""
    whole = {"unquantized": (16, 0.0), **costs}
    order = (*costs, "unquantized") if "unquantized" not in costs else tuple(costs)
    return Options(name, (name,), 8, {key: whole[key][0] for key in order}, {key: whole[key][1] for key in order}, {})


def a_point(schemes: Sequence[str] = (), divergence: float = 0.01, **changes: Any) -> Point:
    """A measured choice on the frontier; its bytes follow its schemes: 8 for each quantized unit, and 16 otherwise."""
    size = sum(16 if scheme == "unquantized" else 8 for scheme in schemes)
    fields: dict[str, Any] = {
        "kind": "frontier",
        "name": "",
        "weight_bytes": 100 + size,
        "bits": size / max(1, len(schemes)),
        "predicted": divergence,
        "predicted_error": 0.0,
        "divergence_low": divergence / 2,
        "divergence_high": 2 * divergence,
        "image_divergence": divergence,
        "text_divergence": divergence,
        "divergence_by_sample": (divergence, divergence),
        "top1_agreement": 0.9 if divergence else 1.0,
        "perplexity": 10.0 + divergence,
        "accuracy": None,
        "answers_lost": None,
        "relative_error": divergence,
        "sqnr_db": 30.0 if divergence else None,
        "sqnr_db_lowest": 29.0 if divergence else None,
    }
    return Point(schemes=tuple(schemes), divergence=divergence, **fields | changes)


def a_frontier(
    units: Sequence[str], points: Iterable[Point], controls: Iterable[Point] = (), **changes: Any
) -> Frontier:
    """A measured frontier of units with one op each, which can have W8A8."""
    fields: dict[str, Any] = {
        **asdict(ARITHMETIC),
        "candidates": ("W8A8",),
        "loss": "divergence",
        "other_bytes": 100,
        "calibration_batches": 4,
        "batches": 2,
        "samples": 2,
        "tokens": 48,
        "answers": 0,
    }
    rows = tuple(options(name, W8A8=(8, 0.01)) for name in units)
    return Frontier(units=rows, points=tuple(points), controls=tuple(controls), **fields | changes)


def two_units(**changes: Any) -> Frontier:
    """The frontier of the units a and b in W8A8, with a uniform scheme, a random choice and the edges first."""
    points = [
        a_point(["W8A8", "W8A8"], 0.04),
        a_point(["W8A8", "unquantized"], 0.01),
        a_point(["unquantized", "unquantized"], 0.0),
    ]
    controls = [
        a_point(["W8A8", "W8A8"], 0.04, kind="uniform", name="W8A8"),
        a_point(["unquantized", "W8A8"], 0.03, kind="random", name="random_0"),
        a_point(["unquantized", "W8A8"], 0.03, kind="edges", name="first and last layers"),
    ]
    return a_frontier("ab", points, controls, **changes)


def a_profile(point: Point, **changes: Any) -> Profile:
    """A profile of a point whose units are not told."""
    return Profile(point, **{"assignment": {}, "kept": (), **changes})


def a_damage(heldout: float, sqnr_db: float | None = 30.0) -> Damage:
    """A state with so many nats on held-out samples, and a tenth more on calibration samples."""
    return Damage(Distance(1.1 * heldout, sqnr_db), Distance(heldout, sqnr_db))


def a_cure(kind: str, divergence: float = 0.01, **changes: Any) -> Cure:
    """A cure that leaves so many of 0.04 nats."""
    gain = 0.04 - divergence
    fields: dict[str, Any] = {
        "settings": {kind: "0.8" if kind == "smoothing" else ""},
        "damage": a_damage(divergence, 35.1),
        "regained": gain,
        "low": gain - 0.005,
        "high": gain + 0.005,
        "folds_into": "norm" if kind == "smoothing" else "",
    }
    return Cure(kind, **fields | changes)


def a_cause(ops: Sequence[str] = ("a",), scheme: str = "W8A8", **changes: Any) -> Cause:
    """A unit that its inputs break, by the outlier channel 3, and that smoothing cures."""
    histogram = Histogram(-1.0, 1.0, (1, 0, 1000, 2))
    fields: dict[str, Any] = {
        "profiles": ("smallest",),
        "whole": a_damage(0.04),
        "weight_alone": a_damage(0.002, 36.0),
        "inputs_alone": a_damage(0.038, 30.5),
        "inputs": InputFacts(
            (-1.5, 1.0), (-1.0, 1.0), (-1.5, 1.0), (-1.0, 0.5), 0.01, (Channel(3, 40.0),), 1, histogram
        ),
        "weight": WeightFacts(4.0, 20.0, ops[0], 7, 0.0, histogram),
        "cures": (
            a_cure("smoothing"),
            a_cure("mse_weight", 0.05),
            a_cure("percentile_inputs", reason="each input has its own scale, so the calibration sets no range"),
            a_cure("asymmetric_inputs", 0.041),
        ),
        "strengths": {"0.5": 0.02, "0.8": 0.011},
        "chosen": "smoothing",
    }
    return Cause(changes.pop("unit", ops[0]), tuple(ops), scheme, **fields | changes)


def a_why(*causes: Cause, **cured: Cured) -> Why:
    """Causes, and {profile: the profile with cures}."""
    return Why(calibration_batches=2, heldout_batches=2, heldout_samples=4, causes=causes, cured=cured)


def profiles_of(profiles: Mapping[str, Profile], missed: Mapping[str, str] = MappingProxyType({})) -> Profiles:
    """Named profiles without a target."""
    return Profiles({}, dict(profiles), dict(missed))
