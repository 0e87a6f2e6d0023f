"""INC 2.6's mse_v2 helpers, run unmodified, with a capture of the scores that the helpers do not return.

INC computes the error of every op in `get_mse_order_per_fp32` and `get_mse_order_per_int8`, and returns only the order
of the names. Both helpers look up `sorted` and `tqdm` as names of their module, so this module replaces the two names
there. The new `sorted` sees all scores through the sort key; the new `tqdm` limits the ops that are scored. INC's code
is neither edited nor copied.
"""

import builtins
import copy
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import neural_compressor.adaptor.pytorch as nc_pytorch
import neural_compressor.adaptor.torch_utils.util as nc_util
import torch
from neural_compressor.adaptor.pytorch import PyTorch_FXAdaptor, _cfg_to_qconfig, _cfgs_to_fx_cfgs
from neural_compressor.config import PostTrainingQuantConfig, _Config, options
from neural_compressor.model import Model
from neural_compressor.strategy.mse_v2 import MSE_V2TuneStrategy
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.quantize_fx import prepare_fx

OpKey = tuple[str, str]  # (op_name, op_type), INC's own key
HELPERS = {"fallback": "get_mse_order_per_fp32", "requantize": "get_mse_order_per_int8"}
MISSING = object()
# What FX makes of a module whose output a BatchNorm takes.
WITH_NORM = {"Linear": "LinearBn1d", "Conv1d": "ConvBn1d", "Conv2d": "ConvBn2d", "Conv3d": "ConvBn3d"}
TORCH_NAMES = (torch.dtype, torch.qscheme)


@dataclass
class HelperCall:
    """The scores that one call of one of INC's helpers computed.

    `helper` is `fallback` (get_mse_order_per_fp32) or `requantize` (get_mse_order_per_int8). `scores` maps each op to
    INC's sum of squared errors at the measured output, in the order in which INC computed them. `second_pass` holds
    the fallback helper's second scores of at most 5 ops, with the worst op in FP32 as well. They belong to another
    state, so they must not be mixed with `scores`. `order` is what the helper returned.
    """

    helper: str
    scores: dict[OpKey, float] = field(default_factory=dict)
    second_pass: dict[OpKey, float] = field(default_factory=dict)
    order: list[OpKey] = field(default_factory=list)


@dataclass
class Capture:
    """The calls that were seen while `capture_mse_v2_sensitivity` was active, in order."""

    calls: list[HelperCall] = field(default_factory=list)

    def last(self, helper: str) -> HelperCall:
        """The latest call of a helper.

        Raises:
            LookupError: the helper was never called.
        """
        for call in reversed(self.calls):
            if call.helper == helper:
                return call
        raise LookupError(f"INC's {HELPERS[helper]} was not called")


@contextmanager
def capture_mse_v2_sensitivity(
    only: Collection[str] | None = None, on_op: Callable[[str], None] | None = None
) -> Iterator[Capture]:
    """Install the patch on INC, yield the capture, and restore everything, whatever happens in between.

    Restored on success and on any exception: INC's helpers, its `sorted` and `tqdm`, the hooks that the helpers leave
    on the model, and `torch.nn.Parameter.__deepcopy__`. INC's global `op_cfg_mapping` is restored too, because it would
    carry one model's qconfigs into the next. Captures may be nested and used again. Both an inner and an outer capture
    see the calls during the inner one.

    Args:
        only: names of the ops to score; None scores all.
        on_op: called with an op's name before INC scores it.
    """
    capture = Capture()
    helpers = {
        name: _capturing(helper, getattr(nc_util, name), capture, only, on_op) for helper, name in HELPERS.items()
    }
    saved_mapping = dict(nc_util.op_cfg_mapping)
    nc_util.op_cfg_mapping.clear()
    try:
        with replaced_names(**helpers), copies_sharing_parameters():
            yield capture
    finally:
        nc_util.op_cfg_mapping.clear()
        nc_util.op_cfg_mapping.update(saved_mapping)


@contextmanager
def copies_sharing_parameters() -> Iterator[None]:
    """INC copies the model for every op (deepcopy). The weights are only read there, so the copies may share them."""

    def share(parameter: torch.nn.Parameter, memo: dict[int, Any]) -> torch.nn.Parameter:
        memo[id(parameter)] = parameter
        return parameter

    saved = torch.nn.Parameter.__deepcopy__
    torch.nn.Parameter.__deepcopy__ = share  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Parameter.__deepcopy__ = saved  # type: ignore[method-assign]


@contextmanager
def replaced_names(**values: Any) -> Iterator[None]:
    """Set names of INC's module for the duration, and restore the old values, or that the name was absent."""
    saved = {name: getattr(nc_util, name, MISSING) for name in values}
    for name, value in values.items():
        setattr(nc_util, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is MISSING:
                delattr(nc_util, name)
            else:
                setattr(nc_util, name, value)


def _capturing(
    helper: str,
    original: Callable[..., list[OpKey]],
    capture: Capture,
    only: Collection[str] | None,
    on_op: Callable[[str], None] | None,
) -> Callable[..., list[OpKey]]:
    """The function that INC calls in place of `original`: it delegates, captures, and returns the same order."""

    def patched(adaptor: Any, model: torch.nn.Module, example_input: Any, tune_cfg: dict[str, Any]) -> list[OpKey]:
        call = HelperCall(helper)
        passes = iter((call.scores, call.second_pass))

        def capturing_sorted(items: Iterable[Any], *, key: Any = None, reverse: bool = False) -> list[Any]:
            items = list(items)
            next(passes).update((item, float(key(item))) for item in items)
            in_order: list[Any] = within["sorted"](items, key=key, reverse=reverse)
            return in_order

        def bounding_tqdm(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
            for name, value in within["tqdm"](items):
                # torch caches this function by module, and so keeps every quantized copy of the model alive.
                assert_and_get_unique_device.cache_clear()
                if only is None or name in only:
                    if on_op is not None:
                        on_op(name)
                    yield name, value

        outer: dict[str, Any] = {name: getattr(nc_util, name, MISSING) for name in ("sorted", "tqdm")}
        # In a nested capture the names are already replaced; the inner capture's names stay active within these. INC's
        # own tqdm is left out, because the caller shows progress.
        within: dict[str, Any] = {"sorted": builtins.sorted, "tqdm": iter} if outer["sorted"] is MISSING else outer
        hooks = {module: list(module._forward_hooks) for module in model.modules()}
        try:
            with replaced_names(sorted=capturing_sorted, tqdm=bounding_tqdm):
                call.order = list(original(adaptor, model, example_input, tune_cfg))
        finally:
            assert_and_get_unique_device.cache_clear()
            for module, kept in hooks.items():
                # transformers adds hooks too, in the first forward of a model, and needs them in later ones.
                left = [
                    handle for handle, hook in module._forward_hooks.items() if handle not in kept and _is_incs(hook)
                ]
                for handle in left:
                    del module._forward_hooks[handle]
        capture.calls.append(call)
        return list(call.order)

    return patched


def _is_incs(hook: Any) -> bool:
    """Whether INC defines a hook."""
    return str(getattr(hook, "__module__", "")).startswith("neural_compressor")


@contextmanager
def activations_reduced(wanted: bool | None) -> Iterator[bool]:
    """Have INC quantize activations to 7 bits of 8 (True) or to all 8 (False) for the duration; None keeps its choice.

    INC 2.6 reads `REDUCE_RANGE` of its PyTorch adaptor wherever it makes an observer. It sets the name once: True on a
    CPU without VNNI, whose 8-bit products can saturate. `PostTrainingQuantConfig.reduce_range` reaches ONNX alone.

    Yields:
        Which of the two is active.
    """
    saved = nc_pytorch.REDUCE_RANGE
    nc_pytorch.REDUCE_RANGE = saved if wanted is None else wanted
    try:
        yield nc_pytorch.REDUCE_RANGE
    finally:
        nc_pytorch.REDUCE_RANGE = saved


@contextmanager
def temporary_workspace() -> Iterator[None]:
    """Let INC write its `nc_workspace` into a temporary directory that is removed afterwards."""
    saved = options.workspace
    with tempfile.TemporaryDirectory(prefix="inc-workspace-") as directory:
        options.workspace = directory
        try:
            yield
        finally:
            options.workspace = saved


def build_strategy(
    model: torch.nn.Module, conf: PostTrainingQuantConfig, calib_dataloader: Any
) -> tuple[MSE_V2TuneStrategy, dict[str, Any]]:
    """INC's own mse_v2 strategy for a model, and the first tuning configuration it would try.

    Args:
        model: an FP32 model in eval mode on the CPU.
        conf: with `strategy="mse_v2"` and `approach="static"`.
        calib_dataloader: yields `(inputs, label)` and has a `batch_size`, as INC expects.

    Returns:
        The strategy, ready to score, and INC's tune_cfg: `tune_cfg["op"]` maps (op_name, op_type) to its configuration
        in INC's order.
    """
    config = _Config(quantization=conf, benchmark=None, pruning=None, distillation=None, nas=None)
    # INC copies the model here too, to find which of its parts can be traced.
    with temporary_workspace(), copies_sharing_parameters():
        strategy = MSE_V2TuneStrategy(model=Model(model, conf=conf), conf=config, q_dataloader=calib_dataloader)
        strategy._prepare_tuning()
        tune_cfg = strategy._tune_cfg_converter(next(strategy.next_tune_cfg()))
    return strategy, tune_cfg


def describe_observers(qconfig: Any) -> dict[str, dict[str, Any]]:
    """A qconfig as JSON: for `activation` and `weight`, the observer's class under `name`, and its arguments."""
    sides = {"activation": qconfig.activation, "weight": qconfig.weight}
    return {
        side: {"name": factory.p.func.__name__}
        | {
            key: str(value).removeprefix("torch.") if isinstance(value, TORCH_NAMES) else value
            for key, value in factory.p.keywords.items()
        }
        for side, factory in sides.items()
    }


def fused_patterns(adaptor: Any, model: torch.nn.Module, tune_cfg: dict[str, Any]) -> dict[str, str]:
    """The class of each op's module after INC has prepared the model. FX fuses a Linear and its ReLU, for example.

    Out: {INC's name of the op: class name}. Nothing is calibrated, and the model is copied without its weights.
    """
    with copies_sharing_parameters():
        prepared = copy.deepcopy(model)
    fx_cfgs = _cfgs_to_fx_cfgs(_cfg_to_qconfig(tune_cfg, tune_cfg["approach"]), tune_cfg["approach"])
    if adaptor.sub_module_list is None:
        prepared = prepare_fx(prepared, fx_cfgs, example_inputs=())
    else:
        PyTorch_FXAdaptor.prepare_sub_graph(adaptor.sub_module_list, fx_cfgs, prepared, prefix="")
    assert_and_get_unique_device.cache_clear()
    modules, originals = dict(prepared.named_modules()), dict(model.named_modules())
    return {
        name: _fused(modules[name], originals.get(module_name(model, name)))
        for name, _ in tune_cfg["op"]
        if name in modules
    }


def _fused(module: Any, original: Any) -> str:
    """The class of a prepared module. FX folds a BatchNorm into a weight and a bias, and the module keeps its class."""
    kind = type(module).__name__
    pairs = [(getattr(module, name, None), getattr(original, name, None)) for name in ("weight", "bias")]
    return kind if all(_same(one, other) for one, other in pairs) else WITH_NORM.get(kind, kind)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor)
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def module_name(model: torch.nn.Module, op_name: str) -> str:
    """The name of the module that INC calls `op_name`.

    INC traces a single Linear inside a QuantWrapper, and keeps the wrapper's `.module` in the name of the op.
    """
    names = dict(model.named_modules())
    return op_name if op_name in names else op_name.removesuffix(".module")


def with_measured_op_last(tune_cfg: dict[str, Any], measured_op: str) -> dict[str, Any]:
    """A copy of `tune_cfg` with `measured_op` as the last op, because INC measures the error at the last op.

    Raises:
        LookupError: the plan has no such op.
    """
    result = copy.deepcopy(tune_cfg)
    keys = [key for key in result["op"] if key[0] == measured_op]
    if not keys:
        raise LookupError(f"{measured_op} is not an op of INC's plan, so INC cannot measure there")
    result["op"].move_to_end(keys[0])
    return result


def with_ops_in_fp32(tune_cfg: dict[str, Any], only: Collection[str] | None = None) -> dict[str, Any]:
    """A copy of `tune_cfg` with all ops, or those in `only`, in FP32; INC's second helper quantizes from there."""
    result = copy.deepcopy(tune_cfg)
    for (name, _), configuration in result["op"].items():
        if only is None or name in only:
            configuration["weight"] = {"dtype": "fp32"}
            configuration["activation"] = {"dtype": "fp32", "quant_mode": "fp32"}
    return result


def run_single_mse_v2_sensitivity_pass(
    model: torch.nn.Module,
    conf: PostTrainingQuantConfig,
    calib_dataloader: Any,
    *,
    measured_op: str,
    maps: Collection[str] = ("isolated", "fallback", "requantize"),
    only: Collection[str] | None = None,
    on_op: Callable[[str, str], None] | None = None,
) -> dict[str, HelperCall]:
    """One bounded sensitivity pass over the first batch of `calib_dataloader`, with INC's own strategy.

    `MSE_V2TuneStrategy` makes the plan, and `calculate_op_sensitivity` runs both helpers, whatever the accuracy
    criterion says. Nothing is tuned, and no quantized model is produced.

    Args:
        model: an FP32 model in eval mode on the CPU; left as it was.
        conf: INC's configuration, `strategy="mse_v2"`.
        calib_dataloader: yields `(inputs, label)`; the first batch both calibrates and scores, as in INC.
        measured_op: module name of the op at whose output the error is measured; the model's output op.
        maps: which maps to capture. `fallback`: the op FP32, all others INT8. `requantize`: ops quantized one after
            another and never reset. `isolated`: only this op INT8. `requantize_at`: the values of `requantize`, each
            on its own, with this op and all before it INT8. Two maps have one score, under the last op that the plan
            quantizes. `no_op`: the error of INC's conversion with no op INT8. `all_int8`: with every planned op INT8.
        only: module names of the ops to score; None scores all that the plan quantizes.
        on_op: called with the map and INC's name of the op before it is scored.

    Returns:
        By map: the scores INC computed (sum of squared errors), in its order.
    """
    strategy, tune_cfg = build_strategy(model, conf, calib_dataloader)
    names = [name for name, _ in tune_cfg["op"] if module_name(model, name) == measured_op]
    tune_cfg = with_measured_op_last(tune_cfg, next(iter(names), ""))
    return run_planned_pass(strategy, tune_cfg, calib_dataloader, maps=maps, only=only, on_op=on_op)


def run_planned_pass(
    strategy: MSE_V2TuneStrategy,
    tune_cfg: dict[str, Any],
    calib_dataloader: Any,
    *,
    maps: Collection[str],
    only: Collection[str] | None = None,
    on_op: Callable[[str, str], None] | None = None,
) -> dict[str, HelperCall]:
    """The same pass with an existing strategy, as `build_strategy` returns it.

    Args:
        strategy: the model's strategy.
        tune_cfg: its configuration, with the measured op last.
        calib_dataloader: as in `run_single_mse_v2_sensitivity_pass`, and so are the others.
        maps: which maps to capture.
        only: module names of the ops to score; None scores all that the plan quantizes.
        on_op: called with the map and INC's name of the op before it is scored.
    """
    modules = {name: module_name(strategy.model.model, name) for name, _ in tune_cfg["op"]}
    # tune_cfg also holds ops kept in FP32; "requantizing" such an op would score a change that changes nothing.
    in_order = [name for (name, _), cfg in tune_cfg["op"].items() if cfg["weight"]["dtype"] != "fp32"]
    wanted = [name for name in in_order if only is None or modules[name] in only]

    def score(label: str, cfg: dict[str, Any], ops: Collection[str], fallback: bool) -> HelperCall:
        notify = None if on_op is None else lambda name: on_op(label, name)
        with capture_mse_v2_sensitivity(ops, notify) as capture:
            # Without a qconfig, INC's conversion leaves an op as it is.
            nc_util.op_cfg_mapping.update(dict.fromkeys(qconfigs) if label == "no_op" else qconfigs)
            strategy.adaptor.calculate_op_sensitivity(
                strategy.model, calib_dataloader, copy.deepcopy(cfg), None, 1, fallback=fallback
            )
        return capture.last("fallback" if fallback else "requantize")

    def at(label: str, name: str) -> HelperCall:
        """The score of an op with all before it in the plan's order in INT8 as well."""
        later = in_order[in_order.index(name) :]
        return score(label, with_ops_in_fp32(tune_cfg, later), [name], fallback=False)

    # The state that the first helper leaves for the second one: the qconfig of every planned op.
    qconfigs = {name: qconfig for name, qconfig in _cfg_to_qconfig(tune_cfg, tune_cfg["approach"]).items() if qconfig}
    fp32_cfg = with_ops_in_fp32(tune_cfg)
    results: dict[str, HelperCall] = {}
    if "fallback" in maps:
        results["fallback"] = score("fallback", tune_cfg, wanted, fallback=True)
    if "requantize" in maps:
        results["requantize"] = score("requantize", fp32_cfg, wanted, fallback=False)
    if "isolated" in maps:
        results["isolated"] = HelperCall("isolated")
        for name in wanted:
            results["isolated"].scores.update(score("isolated", fp32_cfg, [name], fallback=False).scores)
    if "no_op" in maps:
        results["no_op"] = score("no_op", fp32_cfg, in_order[-1:], fallback=False)
    if "all_int8" in maps:
        results["all_int8"] = at("all_int8", in_order[-1])
    if "requantize_at" in maps:
        results["requantize_at"] = HelperCall("requantize_at")
        for name in wanted:
            results["requantize_at"].scores.update(at("requantize_at", name).scores)
    return results
