"""The public functions: from a model and batches in memory to a ranking and to profiles, without Snakemake.

In: an FP32 model in eval mode, and batches that it takes as keywords. Out: the records that the commands write.
`import auto_quantize_model as aq` has all of the functions. Each calls the library function that its command calls.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from auto_quantize_model.config import DecideSpec, PlanSpec, SensitivitySpec, Target
from auto_quantize_model.config_text import read_block
from auto_quantize_model.decide.frontier import measure_frontier
from auto_quantize_model.decide.profiles import build_profiles
from auto_quantize_model.decide.ranking import isolated
from auto_quantize_model.documents import read_document, write_document
from auto_quantize_model.files import InputError, digest_of
from auto_quantize_model.machine import choose_device, explained_out_of_memory
from auto_quantize_model.measure.capture import Engine, Progress, capture_sensitivity, digest_of_batch
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.sample import Batch as Encoded
from auto_quantize_model.models.sample import samples_in, tokens_of
from auto_quantize_model.records import (
    Capture,
    Frontier,
    NotMeasured,
    Plan,
    Profiles,
    as_record,
    body_of,
    digest_of_record,
)
from auto_quantize_model.replay.calibrate import calibrate
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.replay.scales import ALL_BATCHES, name_of_batch
from auto_quantize_model.schemes.scheme import INC_INT8

INC_NEEDS = ("neural_compressor", "six", "pkg_resources", "transformers")
Batches = Sequence[Mapping[str, torch.Tensor]]
Saved = Plan | Capture | Frontier | Profiles
KINDS: dict[str, type[Saved]] = {"plan": Plan, "capture": Capture, "frontier": Frontier, "profiles": Profiles}


def prepare(model: torch.nn.Module, *, experts: str = "each") -> dict[str, str]:
    """Make the experts of a model, the Conv1D of GPT-2, and subclasses of Linear and Embedding plain modules, in place.

    `plan` sees plain modules alone. The weights are shared, and every output keeps its bits. The pipeline does the same
    when it loads a model.

    Args:
        model: of transformers, FP32, eval mode, on the CPU.
        experts: `each` makes each matrix of an expert an op. `block` makes the same matrix of all experts one op, for
            schemes of compressed-tensors alone.

    Returns:
        {module name: reason}, for modules that stay as they are, because their bits would change.

    Raises:
        InputError: `experts` is neither of the two.
    """
    if experts not in ("each", "block"):
        raise InputError(f"experts is {experts!r}; give each or block")
    from auto_quantize_model.models.prepare import prepare as prepared

    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose:
        # One expert after the other, as linear layers run.
        choose("eager")
    return prepared(model, experts)


def plan(
    model: torch.nn.Module,
    batches: Batches,
    *,
    confidence_batches: int = 2,
    schemes: Sequence[Any] = ("inc_int8",),
    maps: Sequence[str] = ("isolated",),
    fallback_schemes: Sequence[str] = (),
    experts: str = "each",
    op_type_dict: Mapping[str, str] | None = None,
    op_name_dict: Mapping[str, str] | None = None,
    reduce_range: bool | None = None,
    engine: str = "replay",
) -> Plan:
    """Have Intel Neural Compressor (INC) plan which ops it would quantize, and how. The model stays as it was.

    The keywords are keys of the config's block `sensitivity`. Error messages name them so.

    Args:
        model: FP32, eval mode, on the CPU. `model(**batch)` returns an object with `logits`, float32 of shape
            (samples, tokens, vocabulary), or (samples, classes).
        batches: the calibration batches. Each has `input_ids`, int64 of shape (samples, tokens), and all else that the
            model takes. Those of a model of images alone have `pixel_values` and no `input_ids`.
        confidence_batches: how many of the batches will be scored, each alone.
        schemes: the schemes to measure: `inc_int8`, and as many of compressed-tensors as wanted, such as `W8A8`,
            `FP8_DYNAMIC`, `W4A16` and `NVFP4`. A mapping is a scheme of your own, as in a config.
        maps: which maps will be measured. The ranking needs `isolated`; each other map takes as long again.
        fallback_schemes: schemes in which the map `fallback` is measured besides `inc_int8`.
        experts: as `prepare` was told.
        op_type_dict: op types that stay in FP32, such as `{"Embedding": "fp32"}`.
        op_name_dict: ops that stay in FP32, by regular expressions that match whole names.
        reduce_range: whether activations take 7 bits of 8; None is INC's choice for this CPU.
        engine: `replay` repeats INC's arithmetic in place. `inc` is INC itself. `auto` is the replay, and INC for ops
            that the replay does not cover.

    Raises:
        InputError: INC is not installed, an argument is wrong, or INC cannot plan the model.
    """
    device = _device_of(model)
    scored = _batches(batches, "batches", device)
    if device.type != "cpu":
        raise InputError(f"model: on {device}, and INC plans on the CPU; call model.cpu(), and move the batches too")
    asked = {
        "engine": engine,
        "confidence_batches": confidence_batches,
        "schemes": list(schemes),
        "maps": list(maps),
        "fallback_schemes": list(fallback_schemes),
        "experts": experts,
        "reduce_range": reduce_range,
        "op_type_dict": dict(op_type_dict or {}),
        "op_name_dict": dict(op_name_dict or {}),
    }
    spec = read_block(PlanSpec, asked, "sensitivity")
    if confidence_batches > len(scored):
        raise InputError(f"batches: {len(scored)}, and confidence_batches is {confidence_batches}; give more batches")
    _require_inc()
    from auto_quantize_model.inc.plan import build_plan
    from auto_quantize_model.models.fx_safe import fx_safe

    with _exact(device), fx_safe(model):
        _require_logits(model, scored[0])
        return build_plan(model, scored, spec)


def capture(
    model: torch.nn.Module,
    batches: Batches,
    plan: Plan,
    *,
    store: str | PathLike[str] | None = None,
    exact: str = "all",
    time_budget: str | None = None,
    candidates: Sequence[str] = (),
) -> Capture:
    """Measure the error of every op of the plan on each scored batch. Progress is shown on standard error.

    A plan of the engine `replay` needs no INC.

    Args:
        model: FP32, eval mode, on the CPU or a GPU; left as it was.
        batches: as `plan` takes them, on the model's device.
        plan: of `plan`, or read by `load`.
        store: a folder that keeps each score. A later call with the same model and batches measures only what is new.
            None keeps nothing.
        exact: which scores of the map `isolated` are measured: `all`, `none`, `top:N` for the N ops of each scheme with
            the largest estimates, or `auto`. The others are estimated by Fisher probes.
        time_budget: a time such as `20m`, which chooses the number of probes, and with `auto` the scores.
        candidates: schemes of compressed-tensors that `frontier` will choose from. In these, units of several ops are
            measured as well.

    Returns:
        The scores: a row for each batch, scheme, map and op. `mse_value` is INC's sum of squared errors at
        `plan.measured_op`. `estimates` has the KL divergence of every op where not all scores are measured. Schemes of
        compressed-tensors with static inputs take the ranges of all batches together.

    Raises:
        InputError: an argument is wrong, the plan is of another model, an op cannot be measured, or a number is not
            finite.
    """
    device = _device_of(model)
    scored = _batches(batches, "batches", device)
    asked = read_block(SensitivitySpec, {"exact": exact, "time_budget": time_budget}, "sensitivity")
    _require_ops(model, plan)
    with _measuring(device, "capture") as on_progress, _store(store) as scores, ExitStack() as stack:
        by_inc: Engine | None = None
        if plan.engine != "replay":
            _require_inc()
            from auto_quantize_model.inc.engine import measure_by_inc
            from auto_quantize_model.models.fx_safe import fx_safe

            by_inc = measure_by_inc
            stack.enter_context(fx_safe(model))
        of_model = _of_model(model, plan, scored)
        found = calibrate(model, plan, scored, len(plan.schemes) > 1) if plan.engine != "inc" else {}
        captured, _ = capture_sensitivity(
            model,
            scored,
            of_model,
            scores,
            [found[name_of_batch(index)] for index in range(plan.confidence_batches)] if found else None,
            on_progress,
            by_inc,
            found.get(ALL_BATCHES),
            asked.exact,
            asked.time_budget,
            tqdm.write,
            candidates,
        )
    return replace(captured, plan_digest=digest_of_record(plan))


def ranking(plan: Plan, capture: Capture, scheme: str = "inc_int8") -> pd.DataFrame:
    """The ops of a scheme, the most sensitive first, by the map `isolated`.

    `mse_value` ranks in `inc_int8` if all scores were measured. Otherwise the KL divergence ranks.

    Args:
        plan: of `plan`.
        capture: of `capture`.
        scheme: one of the plan's.

    Returns:
        A table with the index `rank`, from 1. Columns are `op_name`, `op_type`, `tied`, `mse_value` (mean over the
        batches) and its standard deviation, `relative_error` and `sqnr_db` (dB) with the same error at positions of
        images and of text, `divergence` (nats, also of images and of text) and `top1_agreement` (a share).
        `measured` is false where `divergence` is an estimate, with its `standard_error` and `split_half`.

    Raises:
        InputError: the capture is of another plan, the map `isolated` was not measured, or the plan lacks the scheme.
    """
    _require_capture(plan, capture)
    if scheme not in plan.schemes:
        raise InputError(f"scheme: {scheme} is not in the plan; its schemes are {', '.join(plan.schemes)}")
    rows = isolated(plan, capture, scheme, "mse_value" if scheme == INC_INT8 else "divergence")
    return pd.DataFrame(rows).set_index("rank")


def frontier(
    model: torch.nn.Module,
    batches: Batches,
    heldout: Batches,
    plan: Plan,
    capture: Capture,
    *,
    answers: Sequence[Sequence[range | None]] | None = None,
    candidates: Sequence[str] | None = None,
    points: int = 12,
    refine_batches: int = 0,
    fixed: Mapping[str, str] | None = None,
    never: Mapping[str, Sequence[str]] | None = None,
    at_least: Mapping[str, str] | None = None,
    seconds: Mapping[str, Mapping[str, float]] | None = None,
    max_divergence: float | None = None,
    max_bits: float | None = None,
    max_seconds: float | None = None,
    store: str | PathLike[str] | None = None,
) -> Frontier:
    """Choose a scheme for each unit of ops for growing budgets, and measure each choice on held-out batches.

    All calibration batches together set the scales. The keywords are keys of the config's blocks `decide` and
    `profiles`.

    Args:
        model, batches, plan, store: as `capture` takes them.
        heldout: batches like `batches` that no scale comes from.
        capture: of `capture`, with the same plan and candidates.
        answers: for each held-out batch, of each sample, the positions of its answer's tokens in `input_ids`, or None.
        candidates: the schemes to choose from; None takes those of the capture, or `inc_int8` where it has none.
        points: how many budgets, from the smallest model to the unquantized one.
        refine_batches: the choices for `max_bits` and `max_seconds` are refined on so many calibration batches.
        fixed, never, at_least: what units get, by regular expressions for whole names of ops.
        seconds: the time of an op in each scheme and `unquantized`, by regular expressions for whole names of ops.
        max_divergence: also search the smallest choice that reaches this divergence, in nats per token.
        max_bits: also measure the best choice for so many bits a weight.
        max_seconds: also measure the best choice that takes so much time, by `seconds`.

    Returns:
        `points` are the best choices, from the smallest to the unquantized model; `controls` are other choices.
        `frontier.assignment(point)` is {op_name: scheme}.

    Raises:
        InputError: an argument is wrong, a held-out batch sets scales too, the replay does not cover an op, or a number
            is not finite.
    """
    device = _device_of(model)
    calibration, unseen = _batches(batches, "batches", device), _batches(heldout, "heldout", device)
    _require_ops(model, plan)
    _require_capture(plan, capture)
    _require_unseen(unseen, calibration)
    chosen = list(candidates or capture.candidates or [INC_INT8])
    if lacking := [name for name in chosen if name not in plan.schemes]:
        raise InputError(f"candidates: {lacking[0]} is not in the plan; its schemes are {', '.join(plan.schemes)}")
    asked: dict[str, Any] = {"heldout_batches": len(unseen), "points": points, "refine_batches": refine_batches}
    asked |= {"fixed": dict(fixed or {})}
    asked |= {"never": {key: list(names) for key, names in (never or {}).items()}, "at_least": dict(at_least or {})}
    asked |= {"seconds": {key: dict(times) for key, times in (seconds or {}).items()}}
    spec = read_block(DecideSpec, asked, "decide")
    limits = {"max_divergence": max_divergence, "max_bits": max_bits, "max_seconds": max_seconds}
    target = read_block(Target, limits, "profiles")
    if max_seconds is not None and not seconds:
        raise InputError("max_seconds needs the times of the ops; give seconds too")
    if refine_batches > len(calibration):
        raise InputError(f"refine_batches ({refine_batches}) is more than the {len(calibration)} batches; give more")
    if refine_batches and (no := [name for name in chosen if name == INC_INT8 or "checkpoint" in plan.schemes[name]]):
        raise InputError(f"refine_batches: no choice of {no[0]} can be refined; set refine_batches to 0")
    if refine_batches and max_bits is None and max_seconds is None:
        raise InputError("refine_batches: there is no budget to refine a choice for; give max_bits or max_seconds")
    spans = _answers(answers, unseen)
    with _measuring(device, "frontier") as on_progress, _store(store) as scores:
        of_model = _of_model(model, plan, calibration)
        return measure_frontier(
            model,
            of_model,
            capture,
            chosen,
            calibrate(model, of_model, calibration, True)[ALL_BATCHES],
            unseen,
            spans,
            scores,
            spec,
            target,
            calibration,
            on_progress,
        )


def profiles(
    frontier: Frontier,
    plan: Plan,
    *,
    max_divergence: float | None = None,
    max_accuracy_drop: float | None = None,
    min_sqnr_db: float | None = None,
    max_bits: float | None = None,
    max_weight_bytes: int | None = None,
    max_seconds: float | None = None,
) -> Profiles:
    """Name measured choices: `smallest` reaches the limits of the loss, `safest` the budget, `balanced` is the knee.

    Args:
        frontier: of `frontier`.
        plan: of `plan`.
        max_divergence: what the output may lose on the held-out batches, in nats per token.
        max_accuracy_drop: the share of answers, 0 to 1, that may go wrong where the unquantized model is right.
        min_sqnr_db: what the output has to reach, in dB.
        max_bits: how many bits a weight may take on average.
        max_weight_bytes: what the weights of the model may take.
        max_seconds: what the ops may take, by the table of times that the frontier was made with.

    Returns:
        `profiles` holds the profiles by name. `missed` says why another does not exist. `profile.assignment` is
        {op_name: scheme}.

    Raises:
        InputError: a value is out of its range.
    """
    asked = {
        "max_divergence": max_divergence,
        "max_accuracy_drop": max_accuracy_drop,
        "min_sqnr_db": min_sqnr_db,
        "max_bits": max_bits,
        "max_weight_bytes": max_weight_bytes,
        "max_seconds": max_seconds,
    }
    return build_profiles(frontier, plan, read_block(Target, asked, "profiles"))


def save(record: Saved, path: str | PathLike[str]) -> None:
    """Write a plan, a capture, a frontier or profiles as JSON, whole or not at all.

    Raises:
        InputError: another kind of object, or a place that cannot be written.
    """
    kind = next((kind for kind, known in KINDS.items() if isinstance(record, known)), None)
    if kind is None:
        raise InputError(f"record: a {type(record).__name__}; give one of {', '.join(KINDS)}")
    write_document(Path(path), kind, body_of(record))


def load(path: str | PathLike[str]) -> Any:
    """The record that `save` wrote, or that the pipeline wrote, such as `results/MODEL/CALIBRATION/plan.json`.

    Returns:
        A `Plan`, `Capture`, `Frontier` or `Profiles`, by what the file says.

    Raises:
        InputError: there is no such file, it was changed since it was written, or it holds another kind of document.
    """
    document = read_document(Path(path))
    if document.kind not in KINDS:
        raise InputError(f"{path}: a {document.kind}; name a file of one of {', '.join(KINDS)}")
    if document.get("status") == "not_measured":
        return as_record(NotMeasured, document)
    return as_record(KINDS[document.kind], document)


def _device_of(model: torch.nn.Module) -> torch.device:
    """The one device of a model that can be measured.

    Raises:
        InputError: no module, in train mode, not FP32, without parameters, or on several devices.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model: a {type(model).__name__}; give a torch.nn.Module")
    if training := [name or "the model" for name, module in model.named_modules() if module.training]:
        raise InputError(f"model: {training[0]} is in train mode; call model.eval()")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(f"model: {name} is {tensor.dtype}; load the model in torch.float32, or call model.float()")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise InputError(f"model: its parameters are on {len(devices)} devices ({', '.join(devices)}); move all to one")
    device = torch.device(devices[0])
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"model: on {device}, where INC's arithmetic cannot be repeated; move the model to the CPU")
    return device


def _batches(batches: Batches, name: str, device: torch.device) -> list[Batch]:
    """The batches as dicts, seen to be on the model's device.

    Raises:
        InputError: naming the batch and the tensor.
    """
    if not isinstance(batches, Sequence):
        raise InputError(f"{name}: a {type(batches).__name__}, which may give other batches each time; give a list")
    if not batches:
        raise InputError(f"{name}: an empty list; give at least one batch")
    for index, batch in enumerate(batches):
        place = f"{name}[{index}]"
        if not isinstance(batch, Mapping):
            raise InputError(f"{place}: a {type(batch).__name__}; give a dict of the model's keywords and tensors")
        for key, tensor in batch.items():
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{place}[{key!r}]: a {type(tensor).__name__}; give a tensor, or leave the key out")
            if tensor.device != device:
                raise InputError(f"{place}[{key!r}]: on {tensor.device}, and the model is on {device}; move the tensor")
        of_images = "pixel_values" in batch and "input_ids" not in batch
        if not of_images and ("input_ids" not in batch or batch["input_ids"].dim() != 2):
            raise InputError(f"{place}: no input_ids of shape (samples, tokens); give the token ids under that key")
    return [batch if isinstance(batch, Encoded) else dict(batch) for batch in batches]


def _require_logits(model: torch.nn.Module, batch: Batch) -> None:
    """Refuse a model whose output has no `logits`. What the model itself raises stays as it is, with its traceback.

    Raises:
        InputError: as said.
    """
    output = model(**batch)
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        raise InputError(f"model: returns a {type(output).__name__}; return an object with the tensor logits")


def _require_inc() -> None:
    """Refuse to go on where INC, or a package that INC does not declare, is missing.

    Raises:
        InputError: with the command that installs them.
    """
    if missing := [name for name in INC_NEEDS if find_spec(name) is None]:
        raise InputError(
            f"Intel Neural Compressor cannot run, since {missing[0]} is not installed; run"
            " pip install auto-quantize-model[inc], or load a plan of the engine replay"
        )


def _require_ops(model: torch.nn.Module, plan: Plan) -> None:
    """Refuse a plan that names a module or a shape that the model does not have.

    Raises:
        InputError: naming the first one.
    """
    modules = dict(model.named_modules())
    for name in (*plan.op_names, plan.measured_op):
        if name not in modules:
            raise InputError(f"plan: the model has no module {name}; make a plan of this model")
    for op in plan.ops:
        weight = getattr(modules[op.op_name], "weight", None)
        shape = () if weight is None else tuple(weight.shape)
        if shape != op.shape:
            raise InputError(
                f"plan: {op.op_name} has a weight of shape {op.shape}, and of shape {shape} in the model; make a plan"
                " of this model"
            )


def _require_capture(plan: Plan, capture: Capture) -> None:
    """Refuse a capture that no ranking of this plan can come from.

    Raises:
        InputError: as said.
    """
    if capture.plan_digest != digest_of_record(plan):
        raise InputError("capture: measured by another plan; give the plan that it was measured by, or measure again")
    if "isolated" not in plan.maps:
        raise InputError("plan: its maps lack isolated, which the ranking comes from; plan with that map")


def _require_unseen(heldout: Sequence[Batch], calibration: Sequence[Batch]) -> None:
    """Refuse a held-out batch that sets scales as well.

    Raises:
        InputError: naming both.
    """
    seen = {digest_of_batch(batch): index for index, batch in enumerate(calibration)}
    for index, batch in enumerate(heldout):
        if (same := seen.get(digest_of_batch(batch))) is not None:
            raise InputError(f"heldout[{index}]: the same as batches[{same}]; hold out batches that set no scale")


def _answers(given: Sequence[Sequence[range | None]] | None, heldout: Sequence[Batch]) -> list[list[range | None]]:
    """The positions of the answers for each held-out batch and sample; None for each where none are given.

    Raises:
        InputError: not a list for each batch, not an entry for each sample, or positions that no token predicts.
    """
    if given is None:
        return [[None] * samples_in(batch) for batch in heldout]
    if len(given) != len(heldout):
        raise InputError(f"answers: {len(given)} entries for {len(heldout)} held-out batches; give one for each batch")
    for index, (spans, batch) in enumerate(zip(given, heldout, strict=True)):
        known = tokens_of(batch)
        samples, tokens = samples_in(batch), 0 if known is None else known.shape[1]
        if len(spans) != samples:
            raise InputError(f"answers[{index}]: {len(spans)} entries for {samples} samples; give one for each sample")
        for span in spans:
            if span is not None and not (span.step == 1 and 1 <= span.start < span.stop <= tokens):
                raise InputError(f"answers[{index}]: {span}; name positions from 1 to {tokens - 1} in a row, or None")
    return [list(spans) for spans in given]


def _of_model(model: torch.nn.Module, plan: Plan, batches: Sequence[Batch]) -> Plan:
    """The plan with a digest of the model in memory, so that a store never gives the scores of another model.

    The digest is of the modules, the parameters and buffers, and the FP32 output on the first batch. The output stands
    for Python code that no digest of weights sees.

    Raises:
        InputError: the FP32 output is not finite.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with Replay(model, (), plan.measured_op) as replay:
        output = replay.begin(batches[0])
    weights_and_output = digest_of_batch({**tensors, "": output})
    kinds = [f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()]
    return replace(plan, model_digest=digest_of([str(model), kinds, weights_and_output]))


@contextmanager
def _store(folder: str | PathLike[str] | None) -> Iterator[ScoreStore]:
    """The score store in a folder, or in a temporary one."""
    if folder is not None:
        yield ScoreStore(Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix="auto-quantize-") as temporary:
        yield ScoreStore(Path(temporary))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 that means float32. Torch's switches are set back at the end."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        choose_device(device.type)
        with torch.no_grad():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _measuring(device: torch.device, what: str) -> Iterator[Progress]:
    """Exact arithmetic, and a bar on standard error: call what is yielded with what is done and the total."""
    # In a notebook or a file each update may be a line, so updates are rare there.
    bar = tqdm(desc=what, mininterval=0.5 if sys.stderr.isatty() else 15, dynamic_ncols=True)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, _exact(device), explained_out_of_memory(device):
        yield show
