"""Small records for tests: each field that a test does not name has a plain value."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from auto_quantize_model.records import (
    Answers,
    Arithmetic,
    Audit,
    CalibrationManifest,
    Capture,
    Effort,
    Estimate,
    Excluded,
    IncInt8,
    ModelManifest,
    Op,
    Plan,
    Point,
    Profile,
    Profiles,
    SampleEntry,
    Score,
    ScoredBatch,
    Side,
    Tradeoff,
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
COVERAGE: Any = {"weights_total": 8, "weights_planned": 8, "weights_kept": 0, "share": 1.0, "left_out": []}


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
    fields: dict[str, Any] = {"shape": (2, 2), "weight_bytes": 16, "tower": "language", "unit": name}
    fields |= {"schemes": ("inc_int8",), "refused": {}, **changes}
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
        scores += [
            Score(0, "isolated", scheme, name, 10 - kl, kl_divergence=kl, **record) for name, kl in values.items()
        ]
        scores.append(Score(0, "all", scheme, "", 9.0, kl_divergence=sum(values.values()), **record))
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


def a_point(keep: int, sqnr_db: float | None, added: Iterable[str] = (), **changes: Any) -> Point:
    """A keep-list with an SQNR in dB, which says its relative error too."""
    fields: dict[str, Any] = {
        "relative_error": 0.0 if sqnr_db is None else 10 ** (-sqnr_db / 10),
        "sqnr_db_lowest": sqnr_db,
        "kl_divergence": 0.5,
        "top1_agreement": 0.75,
        "accuracy": None,
        "weight_bytes": 100 + 10 * keep,
    }
    return Point(keep=keep, sqnr_db=sqnr_db, added=tuple(added), **fields | changes)


def a_tradeoff(curves: Mapping[str, Iterable[Point]], ops: int, **changes: Any) -> Tradeoff:
    """A measured trade-off of so many ops, with curves by order and no control to compare with."""
    controls = ("random", "inverse", "weight_bytes")
    fields: dict[str, Any] = {
        **asdict(ARITHMETIC),
        "calibration_batches": 4,
        "batches": 2,
        "answers": 10,
        "random": [],
        "gains_db": dict.fromkeys(controls),
        "losses": {control: [] for control in controls},
        "greedy_gain_db": None,
    }
    return Tradeoff(ops=ops, curves={order: list(curve) for order, curve in curves.items()}, **fields | changes)


def with_point(tradeoff: Tradeoff, order: str, index: int, **changes: Any) -> Tradeoff:
    """A trade-off in which one point of a curve differs."""
    curve = list(tradeoff.curves[order])
    curve[index] = replace(curve[index], **changes)
    return replace(tradeoff, curves=tradeoff.curves | {order: curve})


def a_profile(kept: Sequence[str], sqnr_db: float | None = 31.0, **changes: Any) -> Profile:
    """A profile that keeps the named ops and quantizes no other."""
    point = a_point(len(kept), sqnr_db)
    fields = {key: value for key, value in vars(point).items() if key != "added"}
    fields |= {"order": "ranking", "kept": tuple(kept), "worse": {}, "assignment": {}}
    return Profile(**fields | changes)


def profiles_of(profiles: Mapping[str, Profile], missed: str = "") -> Profiles:
    """Named profiles without a target."""
    return Profiles({}, dict(profiles), missed, None, None, {})
