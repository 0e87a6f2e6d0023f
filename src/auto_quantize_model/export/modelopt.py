"""ModelOpt's quant_cfg: for each op the attributes of its two quantizers.

ModelOpt rounds to nearest as compressed-tensors does in the formats below. FP8 was compared by value on a CPU, with
FP32 tensors: weights and inputs differ by the last bit alone. NVFP4 and MXFP8 need a GPU there, so the two were
compared by ModelOpt's source.
"""

import glob
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from auto_quantize_model.export.formats import is_mx, is_nvfp4, is_plain, words
from auto_quantize_model.export.subject import Subject, python_file
from auto_quantize_model.records import Op

TITLE = "NVIDIA ModelOpt"
REMARK = (
    "Checked with ModelOpt 0.47. Use: quantize(model, forward_loop), where forward_loop(model) runs the calibration"
    " samples. NVFP4 and MXFP8 need a GPU. In NVFP4, ModelOpt gives q, k and v their common scale when it writes the"
    " checkpoint, and not before."
)
E4M3, E2M1, E8M0 = (4, 3), (2, 1), (8, 0)
NVFP4 = {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}}
MXFP8 = {"num_bits": E4M3, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E8M0}}
INTEGERS = "ModelOpt maps the largest value to 127, and compressed-tensors to 127.5 (in 4 bits to 7 and 7.5)"
ROUNDED_UP = "ModelOpt rounds the scale of a group up to a power of two, and compressed-tensors rounds to the nearest"


def refusal(scheme: QuantizationScheme, op: Op, shared: bool) -> str:
    """Why ModelOpt cannot hold a scheme with the same values; empty if it can."""
    for side, args in (("weights", scheme.weights), ("inputs", scheme.input_activations)):
        if args is None or attributes(args):
            continue
        if args.type == "int":
            return f"{INTEGERS}, so the values differ"
        if is_mx(args):
            return f"{ROUNDED_UP}, so the values of {words(args)} differ"
        return f"ModelOpt has no {words(args)} for {side}"
    return ""


def attributes(args: QuantizationArgs) -> dict[str, Any]:
    """The attributes of the quantizer of one side; empty if ModelOpt has no such format."""
    if is_nvfp4(args):
        return NVFP4 if args.group_size == 16 else {}
    if is_mx(args):
        return MXFP8 if args.num_bits == 8 else {}
    if is_plain(args, "float", "tensor"):
        return {"num_bits": E4M3, "axis": None}
    if is_plain(args, "float", "channel"):
        return {"num_bits": E4M3, "axis": 0}
    if is_plain(args, "float", "token", dynamic=True):
        return {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: None}}
    if is_plain(args, "float", "group", dynamic=True):
        return {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: args.group_size}}
    if is_plain(args, "float", "block"):
        height, width = args.block_structure
        return {"num_bits": E4M3, "block_sizes": {-1: width, -2: height}}
    return {}


def files(subject: Subject, above: str) -> dict[str, str]:
    """A Python file, because JSON has no tuples and no integers as keys."""
    quantizers = {}
    for name, scheme in subject.schemes.items():
        sides = {"weight_quantizer": scheme.weights, "input_quantizer": scheme.input_activations}
        quantizers[name] = {side: attributes(args) for side, args in sides.items() if args}
    patterns = {
        name: [f"*{glob.escape(common)}" for common in subject.common(ops).values()]
        for name, ops in subject.groups.items()
    }
    return python_file("modelopt_quantize.py", above, quantizers=quantizers, patterns=patterns)
