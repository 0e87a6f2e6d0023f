"""The audit of the schemes of compressed-tensors: the library's own modules, in a copy of the model, measure again.

In: the model, one batch, the plan, the capture, and the input ranges of the calibration. Out: how many values were
compared in each scheme. Any difference is an error, whatever its size. All is computed on the CPU.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

from auto_quantize_model.files import InputError
from auto_quantize_model.machine import with_threads
from auto_quantize_model.measure.metrics import Reference, output_at
from auto_quantize_model.measure.parts import WHOLE, Place, cut
from auto_quantize_model.measure.states import UNITS
from auto_quantize_model.models.checkpoint import Checkpoint
from auto_quantize_model.models.experts import StackedLinear
from auto_quantize_model.models.mapped import Mapped, in_fp32
from auto_quantize_model.records import Capture, Plan, Scales, Score
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.compressed import (
    QuantizationParameters,
    global_scale,
    input_parameters,
    put_parameters,
    quantized_weight,
    weight_parameters,
)
from auto_quantize_model.schemes.scheme import Assignment, assigned

MIXED = "a mixed assignment"


def audit_served(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    index: int,
    plan: Plan,
    capture: Capture,
    count: int,
    scales: Scales,
    on_state: Callable[[int, int], None] = lambda done, total: None,
    place: Place = WHOLE,
) -> dict[str, int]:
    """Compare single ops, a unit, all ops, and a mixed assignment with the model as compressed-tensors quantizes it.

    Scores of a capture on the CPU are compared themselves. Those of a GPU have other sums, so the replay measures the
    same states again on the CPU.

    Args:
        model: FP32, eval mode, on the CPU; left as it was.
        index: of the batch to compare.
        count: ops to compare in each scheme, the most and the least sensitive among them.
        scales: whose input ranges the capture took.
        on_state: called with the number done and the total.
        place: which part of how many; a part compares its share of the states.

    Returns:
        {scheme: number of compared values}, with the mixed assignment under `MIXED`; empty for a plan without such
        schemes. The weights of the sampled ops were compressed and decompressed in BF16 as well.

    Raises:
        InputError: a value differs. The message names scheme, op, batch and both values.
    """
    schemes = schemes_of(plan.schemes, model)
    if not schemes:
        return {}
    generator = np.random.default_rng(int(capture.plan_digest[:16], 16))
    states = list(states_to_audit(plan, capture, index, count, schemes, generator))
    share = cut([1.0] * len(states), place.parts)[place.number - 1]
    states = states[share.start : share.stop]
    library = Library(model, plan, schemes, scales)
    batch = batches[index]
    compared = dict.fromkeys((*schemes, MIXED), 0)
    own = Replay(copied(model), plan.ops, plan.measured_op, schemes=schemes)
    with with_threads(capture.arithmetic.threads), own as replay:
        reference = Reference.of(library.logits(batch, {}), batch, plan.measured_op)
        replay.set_scales(scales)
        replay.begin(batch)
        for done, (scheme, what, assignment, score) in enumerate(states):
            on_state(done, len(states))
            expected = reference.compare(library.logits(batch, assignment))
            captured = score and capture.arithmetic.device == "cpu"
            found = vars(score) if captured else reference.compare(replay.run(assignment))
            for metric, value in expected.items():
                if found[metric] != value:
                    raise InputError(
                        f"audit: batch {index}, scheme {scheme}, {what}: the {metric} is {found[metric]!r}, and"
                        f" compressed-tensors gives {value!r}. Do not use this capture, and report the difference with"
                        " the plan"
                    )
                compared[scheme] += 1
            if len(assignment) == 1:
                library.require_same_in_bf16(*next(iter(assignment.items())))
    on_state(len(states), len(states))
    return compared


def states_to_audit(
    plan: Plan,
    capture: Capture,
    index: int,
    count: int,
    schemes: Mapping[str, QuantizationScheme | Checkpoint],
    generator: np.random.Generator,
) -> Iterator[tuple[str, str, Assignment, Score | None]]:
    """Each state to compare: (scheme, the state in words, assignment, the captured score or None)."""
    ran = [op for op in plan.ops if op.executions[index]]
    for scheme in schemes:
        # An op that did not run can do so in another state, where a router chooses it.
        able = [op.op_name for op in plan.ops if scheme in op.schemes]
        scores = {name: of_op[index] for name, of_op in capture.of_map("isolated", scheme).items()}
        values = {name: score.mse_value for name, score in scores.items() if score}
        if not values:  # nothing was measured alone, so the estimates order the ops
            values = {name: made.divergence for name, made in capture.estimates_of(scheme).items() if name in able}
        names = sorted(values, key=lambda name: (values[name], name))
        others = [str(name) for name in generator.permutation(names[1:-1])]
        for name in dict.fromkeys([*names[:1], *names[-1:], *others][:count]):
            yield scheme, name, {name: scheme}, scores.get(name)
        yield from unit_to_audit(plan, capture, index, scheme)
        if able:
            yield scheme, "all ops", assigned(able, scheme), capture.all_in(scheme)[index]
    drawn = {op.op_name: str(generator.choice(["", *(name for name in op.schemes if name in schemes)])) for op in ran}
    yield MIXED, "an op in a scheme each", {name: scheme for name, scheme in drawn.items() if scheme}, None


def unit_to_audit(
    plan: Plan, capture: Capture, index: int, scheme: str
) -> Iterator[tuple[str, str, Assignment, Score | None]]:
    """The unit of several ops with the most divergence in a scheme, as `states_to_audit` yields it."""
    scores = {name: of_unit[index] for name, of_unit in capture.of_map(UNITS, scheme).items()}
    known = {name: score.divergence for name, score in scores.items() if score and score.divergence is not None}
    if known:
        name = max(sorted(known), key=known.__getitem__)
        ops = next(unit.ops for unit in plan.units if unit.name == name)
        yield scheme, name, assigned(ops, scheme), scores[name]


class Library:
    """A copy of a model, whose modules compressed-tensors quantizes; weights are shared with the model."""

    def __init__(
        self, model: torch.nn.Module, plan: Plan, schemes: Mapping[str, QuantizationScheme | Checkpoint], scales: Scales
    ) -> None:
        self.model, self.schemes, self.scales = model, schemes, scales
        modules = dict(model.named_modules())
        self.weights = {op.op_name: modules[op.op_name].weight.detach() for op in plan.ops if op.shape}
        self.units = {op.op_name: [other.op_name for other in plan.ops if other.matrix == op.matrix] for op in plan.ops}
        self.measured_op = plan.measured_op

    def logits(self, batch: Batch, assignment: Assignment) -> torch.Tensor:
        """The output at the measured op in a state, float32."""
        model = copied(self.model)
        modules = dict(model.named_modules())
        for name, scheme_name in assignment.items():
            scheme = self.schemes[scheme_name]
            if not self.is_ready(name, scheme):
                continue
            if isinstance(scheme, Checkpoint):
                load(modules, name, scheme)
                with_samples(modules[name])
                continue
            for part, weight in self.parts(modules[name], name):
                self.quantize(part, name, scheme, weight)
                with_samples(part)
                in_memory_for_a_call(part)
        return output_at(model, batch, self.measured_op)

    def parts(self, module: Any, name: str) -> list[tuple[torch.nn.Module, torch.Tensor]]:
        """The Linears of an op and their weights: the op itself, or each expert of a block."""
        if not isinstance(module, StackedLinear):
            return [(module, self.weights[name])]
        module.parts = module.linears()
        return list(zip(module.parts, self.weights[name], strict=True))

    def is_ready(self, name: str, scheme: QuantizationScheme | Checkpoint) -> bool:
        """Whether the calibration has the range of inputs that a scheme needs; without it, the op is unquantized."""
        inputs = None if isinstance(scheme, Checkpoint) else scheme.input_activations
        return not inputs or inputs.dynamic is True or bool((seen := self.scales.get(name)) and seen.input)

    def quantize(self, module: torch.nn.Module, name: str, scheme: QuantizationScheme, weight: torch.Tensor) -> None:
        """Have the library quantize a module, by the minima and maxima of weight and inputs."""
        found = {"weight": self.of_weight(name, scheme, weight)}
        inputs, seen = scheme.input_activations, self.scales.get(name)
        if inputs and inputs.dynamic is not True and seen and seen.input:
            ends, weight = (seen.input.minimum, seen.input.maximum), self.weights[name]
            found["input"] = input_parameters(*ends, inputs, weight.dtype).to(weight.device)
        initialize_module_for_quantization(module, scheme)
        for side, parameters in found.items():
            put_parameters(module, side, parameters)
        module.quantization_status = QuantizationStatus.FROZEN

    def of_weight(self, name: str, scheme: QuantizationScheme, weight: torch.Tensor) -> QuantizationParameters:
        shared = None
        if scheme.weights.strategy == "tensor_group" and self.weights[name].ndim == 2:
            shared = global_scale(self.weights[other] for other in self.units[name])
        return weight_parameters(weight, scheme.weights, shared)

    def require_same_in_bf16(self, name: str, scheme_name: str) -> None:
        """Compress an op's weight in BF16, as a checkpoint does, and decompress the weight.

        Raises:
            InputError: the decompressed weight is not the quantized weight, bit for bit.
        """
        scheme = self.schemes[scheme_name]
        if isinstance(scheme, Checkpoint):  # its weights come compressed
            return
        for weight in self.weights[name].unsqueeze(0).flatten(0, -3):
            self.require_same_weight_in_bf16(name, scheme_name, weight.to(torch.bfloat16))

    def require_same_weight_in_bf16(self, name: str, scheme_name: str, weight: torch.Tensor) -> None:
        """As `require_same_in_bf16`, for one matrix of the op, (rows, columns) in BF16."""
        scheme: Any = self.schemes[scheme_name]
        scheme = scheme.model_copy(deep=True)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data = weight.clone()
        parameters = weight_parameters(weight, scheme.weights)
        expected = quantized_weight(weight, scheme.weights, parameters)
        initialize_module_for_quantization(linear, scheme)
        put_parameters(linear, "weight", parameters)
        linear.quantization_status = QuantizationStatus.FROZEN
        compress_module(linear)
        decompress_module(linear)
        if not torch.equal(linear.weight, expected):
            raise InputError(
                f"audit: scheme {scheme_name}, {name}: the weight that compressed-tensors decompresses in BF16 differs"
                " from the quantized weight. Do not use this capture, and report the difference with the plan"
            )


def load(modules: Mapping[str, torch.nn.Module], name: str, checkpoint: Checkpoint) -> None:
    """Have the library load an op of a checkpoint into a module, decompress the op, and compute in FP32.

    Where the checkpoint changes the norm before the op, a second norm with its parameters gives the module's input.
    """
    module = modules[name]
    initialize_module_for_quantization(module, checkpoint.schemes[name], force_zero_point=False)
    checkpoint.put_into(module, name)
    module.float()
    if norm_name := checkpoint.norms.get(name):
        norm, inputs = copy.deepcopy(modules[norm_name]), []
        norm.load_state_dict(checkpoint.norm_parameters(norm_name))
        modules[norm_name].register_forward_pre_hook(lambda module, args: inputs.append(args))
        module.register_forward_pre_hook(lambda module, args: (norm(*inputs[-1]),))


def with_samples(module: torch.nn.Module) -> None:
    """Give the inputs of a module a dimension for samples where they have none, and take it from the outputs again.

    The library takes one scale per token only in inputs with that dimension; see `schemes.compressed.quantized_input`.
    """
    dimensions: list[int] = []

    def add(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        dimensions.append(args[0].ndim)
        return (args[0].unsqueeze(0),) if args[0].ndim == 2 else args

    def remove(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.squeeze(0) if dimensions.pop() == 2 else output

    module.register_forward_pre_hook(add)
    module.register_forward_hook(remove)


def in_memory_for_a_call(module: Any) -> None:
    """Give a module whose weight stays in its file an FP32 copy for each call, because the library changes the copy."""
    mapped = module.weight
    if not isinstance(mapped, Mapped):
        return

    def fill(module: Any, args: Any) -> None:
        module.weight = torch.nn.Parameter(in_fp32(mapped), requires_grad=False)

    def drop(module: Any, args: Any, output: Any) -> None:
        module.weight = mapped

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that shares all parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
