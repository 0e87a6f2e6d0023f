"""AutoRound's layer_config: for each op the fields of AutoRound's own scheme.

AutoRound tunes the scales and the rounding of weights. So the file fixes the format of each op, and not its values.
"""

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from auto_quantize_model.export.formats import is_mx, is_nvfp4, is_plain, words
from auto_quantize_model.export.subject import Subject, python_file
from auto_quantize_model.records import Op

TITLE = "AutoRound"
REMARK = (
    "Checked with AutoRound 0.16.1. Use: quantize(model, tokenizer), which returns an AutoRound. Its scheme BF16 leaves"
    " all other modules alone. AutoRound tunes the scales and the rounding of weights. The profile was measured with"
    " rounding to nearest, so the model has another error. With format llm_compressor, AutoRound wrote checkpoints of"
    " integer weights, NVFP4 and MX. It wrote none with FP8 or INT8 inputs, and kept these in memory alone."
)


def refusal(scheme: QuantizationScheme, op: Op, shared: bool) -> str:
    """Why AutoRound cannot hold a scheme; empty if it can."""
    weights, inputs = scheme.weights, scheme.input_activations
    if (weights.type, weights.num_bits, weights.symmetric) == ("int", 8, False):
        return "AutoRound refuses asymmetric 8-bit weights"
    if not of_weights(weights):
        return f"AutoRound has no {words(weights)} for weights"
    return "" if of_inputs(inputs) else f"AutoRound has no {words(inputs)} for inputs"


def of_weights(args: QuantizationArgs) -> dict[str, Any]:
    """The fields for the weights; empty if AutoRound has no such format."""
    sizes = {"tensor": 0, "channel": -1, "group": args.group_size}
    if is_mx(args):
        found = {"data_type": "mx_fp", "group_size": args.group_size}
    elif is_nvfp4(args) and args.group_size == 16:
        found = {"data_type": "nv_fp", "group_size": 16}
    elif is_plain(args, "float", "block"):
        found = {"data_type": "fp", "group_size": tuple(args.block_structure)}
    elif is_plain(args, "float", "tensor") or is_plain(args, "float", "channel"):
        found = {"data_type": "fp", "group_size": sizes[args.strategy]}
    elif args.type == "int" and args.strategy in sizes:
        found = {"data_type": "int", "group_size": sizes[args.strategy]}
    else:
        return {}
    return {"bits": args.num_bits, "sym": args.symmetric, **found}


def of_inputs(args: QuantizationArgs | None) -> dict[str, Any]:
    """The fields for the inputs; empty if AutoRound has no such format."""
    if args is None:
        return {"act_bits": 16}
    if is_mx(args):
        found = {"act_data_type": "mx_fp", "act_group_size": args.group_size, "act_dynamic": True}
    elif is_nvfp4(args) and args.group_size == 16:
        found = {"act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16, "act_dynamic": True}
    elif is_plain(args, "float", "tensor"):
        found = {"act_data_type": "fp", "act_group_size": 0, "act_dynamic": False}
    elif is_plain(args, "float", "group", dynamic=True):
        found = {"act_data_type": "fp", "act_group_size": args.group_size, "act_dynamic": True}
    elif is_plain(args, "float", "token", dynamic=True):
        found = {"act_data_type": "fp", "act_group_size": -1, "act_dynamic": True}
    elif (args.type, args.strategy, args.dynamic, args.symmetric) == ("int", "token", True, True):
        found = {"act_data_type": "int", "act_group_size": -1, "act_dynamic": True}
    else:
        return {}
    return {"act_bits": args.num_bits, "act_sym": True, **found}


def files(subject: Subject, above: str) -> dict[str, str]:
    """A Python file, because a block's size is a tuple there."""
    schemes = {
        name: of_weights(scheme.weights) | of_inputs(scheme.input_activations)
        for name, scheme in subject.schemes.items()
    }
    return python_file("autoround_layer_config.py", above, schemes=schemes, groups=subject.groups)
