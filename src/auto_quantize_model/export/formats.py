"""The number format of one side of a scheme, for tools that have names of their own for formats.

In: `QuantizationArgs` of compressed-tensors. Out: what it is, and the words for a refusal.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs


def is_mx(args: QuantizationArgs | None) -> bool:
    """Whether a side is in an MX format: floats in groups of 32 with a power of two as their scale."""
    return args is not None and args.scale_dtype == torch.uint8


def is_nvfp4(args: QuantizationArgs | None) -> bool:
    """Whether a side is in NVFP4: groups with a scale in FP8 below a global scale."""
    return args is not None and args.strategy == "tensor_group"


def is_plain(args: QuantizationArgs | None, type_: str, strategy: str, dynamic: bool = False) -> bool:
    """Whether a side is symmetric, without the scales of MX and NVFP4, of 8 bits, and of a type and a strategy."""
    return (
        args is not None
        and not is_mx(args)
        and (args.type, args.num_bits, args.strategy, args.dynamic) == (type_, 8, strategy, dynamic)
        and args.symmetric
    )


def words(args: QuantizationArgs | None) -> str:
    """A side in words, such as `int4 in groups of 128`."""
    if args is None:
        return "no quantization"
    if is_mx(args):
        return f"MXFP{args.num_bits}"
    if is_nvfp4(args):
        return "NVFP4" if args.group_size == 16 else f"NVFP4 in groups of {args.group_size}"
    kind = {"int": "int", "float": "FP"}[args.type]
    text = f"{'' if args.symmetric else 'asymmetric '}{kind}{args.num_bits}"
    if args.strategy == "group":
        text += f" in groups of {args.group_size}"
    elif args.strategy == "block":
        text += " in blocks of {} x {}".format(*args.block_structure)
    else:
        text += f" per {args.strategy}"
    return f"{text}, dynamic" if args.dynamic else text
