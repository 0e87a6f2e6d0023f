"""The replay inside INC: `quantization.fit(strategy="mse_v2")` runs as it is, and a replay does the slow part.

In: INC's own calls of its two mse_v2 helpers. Out: the order of ops that the helpers would return. The helpers still
run, and still decide the early return, the second pass and the order. Their loops over ops would rebuild the model for
each op, so the loops get no op. A replay fills in the scores before they are sorted. INC's code is neither edited nor
copied.
"""

import builtins
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import neural_compressor.adaptor.torch_utils.util as nc_util
import torch
from neural_compressor.adaptor.pytorch import _cfg_to_qconfig

from auto_quantize_model.inc.plan import inventoried
from auto_quantize_model.inc_pytorch_mse_patching import (
    HELPERS,
    OpKey,
    activations_reduced,
    describe_observers,
    fused_patterns,
    module_name,
    replaced_names,
)
from auto_quantize_model.records import IncInt8, Side
from auto_quantize_model.replay.model import Replay, refusals
from auto_quantize_model.schemes.scheme import assigned

logger = logging.getLogger(__name__)


@contextmanager
def accelerated_mse_v2(reduce_range: bool | None = None) -> Iterator[None]:
    """Let a replay score the ops of INC's `mse_v2` for the duration; all is restored on success and on any exception.

    An op may be one that no site reproduces exactly (a fused pattern, a dynamic configuration). A call with such an op
    goes to INC's own helper unchanged, with a warning that names the op. A model that INC converts wrongly
    (`plan.check_inc`) gets the replay's scores, which are not INC's.

    Args:
        reduce_range: whether INC quantizes activations to 7 bits of 8, in its scores and in the model that it makes.
            None leaves INC's own choice for this CPU.
    """
    helpers = {name: functools.partial(_by_replay, helper, getattr(nc_util, name)) for helper, name in HELPERS.items()}
    with activations_reduced(reduce_range), replaced_names(**helpers):
        yield


def _by_replay(
    helper: str,
    original: Callable[..., list[OpKey]],
    adaptor: Any,
    model: torch.nn.Module,
    example_input: Any,
    tune_cfg: dict[str, Any],
) -> list[OpKey]:
    """The function that INC calls in place of a helper: it calls the helper, with scores from a replay."""
    qconfigs = {name: value for name, value in _cfg_to_qconfig(tune_cfg, tune_cfg["approach"]).items() if value}
    int8 = [name for name in qconfigs if name != "bf16_ops_list"]
    if helper == "requantize":
        # The requantize helper takes the ops to quantize from the qconfigs that the fallback helper left behind.
        left = {name: nc_util.op_cfg_mapping.get(name) for name, _ in tune_cfg["op"]}
        qconfigs = {name: value for name, value in left.items() if value} | qconfigs
    patterns = fused_patterns(adaptor, model, tune_cfg)
    modules = dict(model.named_modules())
    ops = []
    for name, op_type in tune_cfg["op"]:
        if name in qconfigs:
            sides = {side: Side(observer) for side, observer in describe_observers(qconfigs[name]).items()}
            scheme = IncInt8(name, patterns.get(name, "nothing known"), **sides)
            ops.append(inventoried(module_name(model, name), op_type, modules, scheme))
    if refused := refusals(model, ops):
        logger.warning("mse_v2 is not accelerated: %s: %s", *next(iter(refused.items())))
        return original(adaptor, model, example_input, tune_cfg)
    measured_op = module_name(model, list(tune_cfg["op"])[-1][0])
    with Replay(model, ops, measured_op, lambda: nc_util.simple_inference(model, example_input)) as replay:
        replay.calibrate({})
        scores = _Scores(helper, replay, model, int8, dict(tune_cfg["op"].keys()))
        with replaced_names(sorted=scores.sorted, tqdm=scores.tqdm):
            return list(original(adaptor, model, example_input, tune_cfg))


class _Scores:
    """The `tqdm` and `sorted` that a helper finds during one call: `tqdm` learns the ops, `sorted` fills in the scores.

    Both helpers fill a dict of scores in their loop. They sort its keys by a function that closes over the dict.
    """

    def __init__(
        self, helper: str, replay: Replay, model: torch.nn.Module, int8: Iterable[str], types: dict[str, str]
    ) -> None:
        self.helper = helper
        self.replay = replay
        self.module = functools.partial(module_name, model)
        self.reference = replay.measured
        self.int8 = frozenset(map(self.module, int8))
        self.types = types
        self.states: dict[OpKey, frozenset[str]] = {}
        self.order: list[OpKey] = []

    def tqdm(self, items: Iterable[Any]) -> Iterator[Any]:
        """Take the ops of a loop, and leave the loop none."""
        if self.helper == "requantize":
            self.states = self._requantized(items)
        elif not self.order:
            planned = {name: qconfig for name, qconfig in items if name != "bf16_ops_list"}
            for name, qconfig in planned.items():
                nc_util.op_cfg_mapping.setdefault(name, qconfig)  # as the loop would
            self.states = {
                (name, self.types[name]): self.int8 - {self.module(name)}
                for name, qconfig in planned.items()
                if qconfig
            }
        else:
            # The second pass: the worst op of the first pass stays in FP32 as well.
            without_worst = self.int8 - {self.module(self.order[-1][0])}
            self.states = {key: without_worst - {self.module(key[0])} for key in items}
        return iter(())

    def _requantized(self, keys: Iterable[OpKey]) -> dict[OpKey, frozenset[str]]:
        """The states in which ops are quantized one after another and stay quantized."""
        states, so_far = {}, self.int8
        for name, op_type in keys:
            if name in nc_util.op_cfg_mapping:
                if nc_util.op_cfg_mapping[name]:
                    so_far |= {self.module(name)}
                states[name, op_type] = so_far
        return states

    def sorted(self, items: Iterable[OpKey], *, key: Callable[[OpKey], Any], reverse: bool = False) -> list[OpKey]:
        """Fill the dict that `key` reads, in the loop's order, and sort as asked."""
        (scores,) = inspect.getclosurevars(key).nonlocals.values()
        cheapest_first = builtins.sorted(self.states, key=self._place, reverse=self.helper == "fallback")
        measured = {op: self._score(self.states[op]) for op in cheapest_first}
        scores.update((op, measured[op]) for op in self.states)
        self.order = builtins.sorted(items, key=key, reverse=reverse)
        return self.order

    def _score(self, state: frozenset[str]) -> torch.Tensor:
        """INC's value, as a tensor like INC's, so that INC's comparisons round in the same way."""
        return (self.reference - self.replay.run(assigned(state))).pow(2).sum()

    def _place(self, op: OpKey) -> int:
        """A place in the order of runs. fallback: from the last op that runs to the first; requantize: as planned."""
        return self.replay.first_visit.get(self.module(op[0]), -1) if self.helper == "fallback" else 0
