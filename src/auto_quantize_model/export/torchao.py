"""torchao's config by module name.

torchao rounds to nearest as compressed-tensors does in the formats below. All were compared by value on a CPU, with
FP32 tensors (MX in BF16). They are the same up to the last bit. A value on a tie can round the other way.
`Int4WeightOnlyConfig` is not among them, because its zero_point is a float.
"""

from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.export.formats import is_mx, is_nvfp4, is_plain, words
from auto_quantize_model.export.names import regular_expressions
from auto_quantize_model.export.subject import Subject, python_file
from auto_quantize_model.records import Op

TITLE = "torchao"
REMARK = (
    "Checked with torchao 0.18. Use: quantize(model, calibrate) with a model in BF16. calibrate(model) runs the"
    " calibration samples; only FP8 and NVFP4 need it. FP8, NVFP4 and MX run on a GPU that has the format. torchao"
    " keeps integers of fewer than 8 bits in a byte each, so the model takes more memory than the profile says."
)
OWN_SCALE = "torchao gives each weight a global scale of its own, and ops in one matrix were measured with a common one"
# {name in an expression: the import that it needs}.
IMPORTS = {
    "torch.": "import torch",
    "mx_formats.": "from torchao.prototype import mx_formats",
    "quant_api.": "from torchao.prototype.quantization import quant_api",
    "quantization.": "from torchao import quantization",
}


def refusal(scheme: QuantizationScheme, op: Op, shared: bool) -> str:
    """Why torchao cannot hold a scheme with the same values in an op; empty if it can."""
    if not expression(scheme):
        return f"torchao has no {words(scheme.weights)} for weights with {words(scheme.input_activations)} for inputs"
    if is_nvfp4(scheme.weights) and shared:
        return OWN_SCALE
    if scheme.weights.type == "float" and any(side % 16 for side in op.shape):
        return "torchao asks for rows and columns in multiples of 16"
    return ""


def expression(scheme: QuantizationScheme) -> str:
    """The torchao config of a scheme as Python; empty if torchao has no config with the same values."""
    weights, inputs = scheme.weights, scheme.input_activations
    if is_plain(weights, "int", "channel") and is_plain(inputs, "int", "token", dynamic=True):
        return "quantization.Int8DynamicActivationInt8WeightConfig()"
    if is_plain(weights, "float", "channel") and is_plain(inputs, "float", "token", dynamic=True):
        return "quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())"
    if is_plain(weights, "float", "tensor") and is_plain(inputs, "float", "tensor"):
        return "quant_api.Float8StaticActivationFloat8WeightConfig(step=step)"
    if is_nvfp4(weights) and weights.group_size == 16:
        if inputs is None:
            return "mx_formats.NVFP4WeightOnlyConfig()"
        if is_nvfp4(inputs) and inputs.group_size == 16:
            return "mx_formats.NVFP4DynamicActivationNVFP4WeightConfig(step=step, use_triton_kernel=False)"
    if is_mx(weights) and is_mx(inputs) and weights.num_bits == inputs.num_bits:
        return {4: mx("float4_e2m1fn_x2", "EVEN"), 8: mx("float8_e4m3fn", "RCEIL")}.get(weights.num_bits, "")
    if weights.type == "int" and weights.strategy in ("group", "channel") and inputs is None:
        granularity = "PerAxis(0)" if weights.strategy == "channel" else f"PerGroup({weights.group_size})"
        mapping = "SYMMETRIC" if weights.symmetric else "ASYMMETRIC"
        return (
            f"quantization.IntxWeightOnlyConfig(weight_dtype=torch.int{weights.num_bits},"
            f" granularity=quantization.{granularity}, mapping_type=quantization.MappingType.{mapping})"
        )
    return ""


def mx(dtype: str, rounding: str) -> str:
    """The config of an MX format, with the rounding of its scales that compressed-tensors has."""
    return (
        f"mx_formats.MXDynamicActivationMXWeightConfig(activation_dtype=torch.{dtype}, weight_dtype=torch.{dtype},"
        f" scaling_mode=mx_formats.ScaleCalculationMode.{rounding})"
    )


def files(subject: Subject, above: str) -> dict[str, str]:
    """A Python file, because torchao's configs are Python objects."""
    patterns = {name: regular_expressions(subject.common(ops).values()) for name, ops in subject.groups.items()}
    configs = {name: expression(scheme) for name, scheme in subject.schemes.items()}
    imports = sorted({line for use, line in IMPORTS.items() if any(use in config for config in configs.values())})
    observed = [name for name, config in configs.items() if "step=step" in config]
    values = {"patterns": patterns, "configs": configs, "imports": imports, "observed": observed}
    return python_file("torchao_quantize.py", above, **values)
