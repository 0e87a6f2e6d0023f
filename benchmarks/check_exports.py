"""Load every export in its own tool, quantize the model, and check which modules the tool quantizes to how many bits.

Of llm-compressor every tensor is compared too: its checkpoint and ours have the same bits.

    python benchmarks/check_exports.py [TOOL ...]

There are two models: `digits_vlm`, so run `make run` before, and a tiny Qwen2-VL with profiles of several schemes. Each
tool gets a virtual environment of its own in tmp/, which takes gigabytes. `make quantize` checks INC's export. A tool
that cannot be installed, or that fails, is printed, and the exit code is 1.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RUN = Path("results/digits_vlm/digits")
FOLDER = Path("tmp/check_exports")
# Snapshot and exports of each.
MODELS = {
    "digits_vlm": (Path("resources/models/digits_vlm"), RUN / "exports_cpu"),
    "qwen2_vl": (FOLDER / "qwen2_vl", FOLDER / "qwen2_vl_exports"),
}
# The arguments of pip, one call after another.
PACKAGES = {
    "compressed-tensors": [["compressed-tensors"]],
    # Its requirements bound torch and transformers below this project's versions, so it comes without them.
    "llmcompressor": [
        ["compressed-tensors", "accelerate", "datasets", "loguru", "pydantic", "requests"],
        ["--no-deps", "llmcompressor", "auto-round", "nvidia-ml-py"],
    ],
    "modelopt": [["nvidia-modelopt", "requests"]],
    "nncf": [["nncf"]],
    "torchao": [["torchao"]],
    "autoround": [["auto-round"]],
}
INDEX_OF = {"compressed-tensors": "llm_compressor", "llmcompressor": "llm_compressor"}  # the others have their own name
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt", "autoround": "auto-round"}
# The schemes that a tool cannot quantize to without a GPU.
ON_GPU = {"torchao": {"FP8_DYNAMIC"}, "modelopt": {"NVFP4", "NVFP4A16", "MXFP8", "MXFP8A16"}}
# The profiles of the tiny Qwen2-VL: {profile: {module: scheme}}.
LAYER, BLOCK = "model.language_model.layers.0", "model.visual.blocks.0"
QKV = [f"{LAYER}.self_attn.{name}_proj" for name in "qkv"]
GROUPS = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
ZERO_POINTS = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}}
STATIC = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
}
PROFILES = {
    "int8": dict.fromkeys([f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.up_proj", "lm_head"], "inc_int8"),
    "integers": dict.fromkeys(QKV, "W4A16_G32")
    | {f"{LAYER}.mlp.down_proj": "W8A8", f"{BLOCK}.mlp.fc1": "W4A16_ASYM_G32", "lm_head": "W8A8"},
    "fp8": dict.fromkeys(QKV, "FP8_DYNAMIC") | {f"{LAYER}.mlp.down_proj": "FP8", f"{BLOCK}.mlp.fc1": "FP8"},
    "static_fp8": {f"{LAYER}.mlp.down_proj": "FP8", "lm_head": "FP8"},
    "fp4": {f"{LAYER}.self_attn.o_proj": "NVFP4", f"{LAYER}.mlp.down_proj": "MXFP8", f"{BLOCK}.mlp.fc1": "MXFP4"},
    "mixed": dict.fromkeys([*QKV, f"{LAYER}.self_attn.o_proj", f"{BLOCK}.attn.qkv"], "NVFP4")
    | dict.fromkeys([f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"], "NVFP4A16")
    | {f"{LAYER}.mlp.down_proj": "FP8", f"{BLOCK}.attn.proj": "W4A16_G32", f"{BLOCK}.mlp.fc1": "STATIC_INT8"},
}
Bits = dict[str, tuple[int, int]]  # {module: bits of its weight and of its input}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", default=list(PACKAGES), help=", ".join(PACKAGES))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return check(args.tools[0])
    keep_batch()
    make_qwen2_vl()
    return max([in_its_environment(tool) for tool in args.tools])


def keep_batch() -> None:
    """Write the calibration batches and our checkpoints of `digits_vlm`, and the bits of its schemes."""
    from auto_quantize_model.data.batches import load_batches
    from auto_quantize_model.documents import read_document
    from auto_quantize_model.models.snapshot import load_processor
    from auto_quantize_model.records import CalibrationManifest, Plan, Profiles, as_record

    calibration = as_record(CalibrationManifest, read_document(RUN / "calibration_manifest.json"))
    processor = load_processor(MODELS["digits_vlm"][0], calibration.image_backend)
    batches = load_batches(RUN / "calibration" / "calibration.parquet", calibration, processor)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(batches, FOLDER / "digits_vlm.pt")
    plan = as_record(Plan, read_document(RUN / "plan.json"))
    write_ours("digits_vlm", plan, as_record(Profiles, read_document(RUN / "profiles_cpu.json")), batches)
    expect("digits_vlm", {name: fields for name, fields in plan.schemes.items() if "checkpoint" not in fields})


def make_qwen2_vl() -> None:
    """A tiny Qwen2-VL, batches, and exports and checkpoints of its profiles, whose other Linears are all kept."""
    import transformers

    from auto_quantize_model.export.exports import export
    from auto_quantize_model.inc.plan import inventoried
    from auto_quantize_model.models.coverage import cover
    from auto_quantize_model.models.units import units_of
    from auto_quantize_model.records import IncInt8, Plan, Point, Profile, Profiles, Side
    from auto_quantize_model.schemes.compressed import fields_of, scheme_of

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    snapshot, exports = MODELS["qwen2_vl"]
    model.save_pretrained(snapshot)
    ids = torch.tensor([[5, 3, 1, 1, 1, 1, 4, 6]])  # 4 x 4 patches make 2 x 2 image tokens
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 1).long()}
    batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    # Several batches, since a moving average over one batch is its minimum and maximum.
    batches = [batch | {"pixel_values": size * torch.randn(16, 3 * 2 * 14 * 14)} for size in (1, 2, 1)]
    torch.save(batches, FOLDER / "qwen2_vl.pt")
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    as_inc = IncInt8("a", "Linear", Side({}), Side({}))
    ops = [replace(inventoried(name, "Linear", modules, as_inc), executions=(1,)) for name in linears]
    own = {"W4A16_G32": GROUPS, "W4A16_ASYM_G32": ZERO_POINTS, "STATIC_INT8": STATIC}
    served = {scheme for name, profile in PROFILES.items() if name != "int8" for scheme in profile.values()}
    plan = Plan(
        model="qwen2_vl",
        engine="replay",
        confidence_batches=1,
        maps=("isolated",),
        keep={"op_type_dict": {}, "op_name_dict": {}},
        reduce_range=False,
        reduce_range_by="config",
        measured_op="lm_head",
        schemes={"inc_int8": {}} | {name: fields_of(scheme_of(name, own.get(name))) for name in sorted(served)},
        ops=tuple(ops),
        units=tuple(units_of(ops, modules)),
        excluded=(),
        coverage=cover(model, linears, []),
        inc_check={"status": "reproduces_fp32"},
        versions={},
    )
    point = Point("frontier", "", (), 0, 8, 0, 0, 0, 0, 0, None, None, (), 1, None, None, None, 0, None, None)
    profiles = {
        name: Profile(point, given, tuple(op for op in linears if op not in given)) for name, given in PROFILES.items()
    }
    types = {name: type(module) for name, module in modules.items()}
    export(exports, Profiles({}, profiles, {}), plan, types, set(model.state_dict()), 1)
    write_ours("qwen2_vl", plan, Profiles({}, profiles, {}), batches)
    expect("qwen2_vl", plan.schemes)


def write_ours(subject: str, plan: Any, profiles: Any, batches: Any) -> None:
    """Our checkpoint of each profile, with the ranges that llm-compressor's calibration sees.

    It calibrates with eager attention, whatever attention the model was loaded with. That sums in another order than
    SDPA, so the last bits of the inputs differ.
    """
    from auto_quantize_model.export.checkpoint import Source, write_checkpoint
    from auto_quantize_model.models.snapshot import load_model
    from auto_quantize_model.records import ObservedRange, OpScales

    snapshot = MODELS[subject][0]
    model = load_model(snapshot)
    model.set_attn_implementation("eager")
    seen: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            low, high = (end.item() for end in inputs[0].aminmax())
            known = seen.get(name, (low, high))
            seen[name] = min(low, known[0]), max(high, known[1])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    scales = {name: OpScales(input=ObservedRange(*ends)) for name, ends in seen.items()}
    for name, profile in profiles.profiles.items():
        if "inc_int8" not in profile.assignment.values():
            folder = ours(subject, name)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_checkpoint(Source(snapshot, plan, profile.assignment, scales), folder)


def ours(subject: str, profile: str) -> Path:
    """Where our checkpoint of a profile lies."""
    return FOLDER / f"{subject}_{profile}"


def expect(subject: str, schemes: dict[str, Any]) -> None:
    """Write the bits of each scheme for the check, because the tools' environments cannot read a plan."""
    found = {name: [side and side["num_bits"] for side in fields.values()] for name, fields in schemes.items()}
    bits = {name: [sides[0], sides[1] or 16] if sides else [8, 8] for name, sides in found.items()}
    (FOLDER / f"{subject}_bits.json").write_text(json.dumps(bits))


def in_its_environment(tool: str) -> int:
    """Install a tool together with this project's torch and transformers, and run the check there."""
    environment = FOLDER / tool
    python = environment / "bin" / "python"
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in ("torch", "transformers")]
    (FOLDER / "constraints.txt").write_text("\n".join(pins))
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        FOLDER / "constraints.txt",
    ]
    steps = [
        [sys.executable, "-m", "venv", environment],
        [*install, *pins, "pyyaml"],
        *([*install, *packages] for packages in PACKAGES[tool]),
    ]
    for step in steps:
        if subprocess.run(step, stdout=subprocess.DEVNULL).returncode:
            print(f"{tool}: NOT CHECKED, it could not be installed ({' '.join(map(str, step[-2:]))})", flush=True)
            return 1
    # NNCF compiles an extension and stops after a minute by default; llm-compressor logs to stdout.
    surroundings = os.environ | {"NNCF_EXTENSION_LOAD_TIMEOUT": "0", "LLM_COMPRESSOR_LOG_DISABLED": "true"}
    ended = subprocess.run([python, __file__, tool, "--inside"], stdout=subprocess.PIPE, text=True, env=surroundings)
    print(ended.stdout if not ended.returncode else f"{tool}: FAILED\n{ended.stdout}", end="", flush=True)
    return ended.returncode


def check(tool: str) -> int:
    """Quantize each model by each profile's export, and compare modules and bits with the export's index."""
    import transformers

    for subject, (snapshot, exports) in MODELS.items():
        batches = torch.load(FOLDER / f"{subject}.pt")
        bits = json.loads((FOLDER / f"{subject}_bits.json").read_text())
        for profile, tools in json.loads((exports / "index.json").read_text())["profiles"].items():
            entry = tools[INDEX_OF.get(tool, tool)]
            about = f"{tool} {version(DISTRIBUTIONS.get(tool, tool))}: {subject}, {profile}"
            if not entry["files"]:
                print(f"{about}: no file, because the tool cannot hold {', '.join(entry['refused'])}")
                continue
            if ON_GPU.get(tool, set()) & set(entry["quantized"].values()) and not torch.cuda.is_available():
                print(f"{about}: NOT CHECKED, because that needs a GPU")
                continue
            dtype = torch.bfloat16 if tool == "torchao" else torch.float32
            model = transformers.AutoModelForImageTextToText.from_pretrained(snapshot, dtype=dtype).eval()
            expected = {name: tuple(bits[scheme]) for name, scheme in entry["quantized"].items()}
            if tool == "nncf":  # it quantizes what no file names, too
                linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
                expected |= {name: (8, 8) for name in linears if name not in entry["kept"]}
            found = CHECKS[tool](model, exports / profile, batches)
            assert found == expected, sorted(found.items() ^ expected.items())  # noqa: S101
            same = f", all {same_tensors(ours(subject, profile))} tensors as ours" if tool == "llmcompressor" else ""
            print(f"{about}: {len(found)} modules quantized, each to its bits{same}")
    return 0


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_tensors(mine: Path) -> int:
    """How many tensors the checkpoint of llm-compressor has, all of them with the bits of our checkpoint."""
    from safetensors.torch import load_file

    one, other = (load_file(folder / "model.safetensors") for folder in (mine, FOLDER / "compressed"))
    different = sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or in_bits(one[name]) != in_bits(other[name])
    )
    assert not different, different  # noqa: S101
    return len(one)


def in_bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor as what can be compared: NaN and the sign of 0 count too."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def by_compressed_tensors(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    """The recipe as compressed-tensors applies it, which is what a checkpoint carries."""
    import yaml
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    recipe = yaml.safe_load((folder / "llm_compressor_recipe.yaml").read_text())
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    apply_quantization_config(model, QuantizationConfig(**modifier))
    return with_scheme(model)


def by_llmcompressor(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    """The recipe applied by llm-compressor as its comment says. The checkpoint has scales of these modules alone."""
    from llmcompressor import oneshot
    from safetensors import safe_open

    data = torch.utils.data.DataLoader(batches, batch_size=None)
    # It asks for a processor, and does not call it where the data are batches already.
    recipe = str(folder / "llm_compressor_recipe.yaml")
    oneshot(model=model, processor=torch.nn.Identity(), recipe=recipe, dataset=data, pipeline="basic")
    found = with_scheme(model)
    model.save_pretrained(FOLDER / "compressed", save_compressed=True)
    with safe_open(FOLDER / "compressed" / "model.safetensors", "pt") as file:
        scales = [name for name in file.keys() if name.endswith(".weight_scale")]
    assert len(scales) == len(found), sorted(scales)  # noqa: S101
    return found


def with_scheme(model: torch.nn.Module) -> Bits:
    """The bits of the modules that compressed-tensors quantizes."""
    schemes = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    return {
        name: (scheme.weights.num_bits, scheme.input_activations.num_bits if scheme.input_activations else 16)
        for name, scheme in schemes.items()
    }


def by_modelopt(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    quantized = imported(folder / "modelopt_quantize.py").quantize(model, lambda model: model(**batches[0]))
    modules = dict(quantized.named_modules())
    enabled = {name for name, module in modules.items() if getattr(module, "is_enabled", False)}
    weights = {name.removesuffix(".weight_quantizer") for name in enabled if name.endswith(".weight_quantizer")}

    def bits(quantizer: str) -> int:
        own = modules[quantizer].num_bits if quantizer in enabled else 16
        return 1 + sum(own) if isinstance(own, tuple) else own

    found = {name: (bits(f"{name}.weight_quantizer"), bits(f"{name}.input_quantizer")) for name in weights}
    named = {f"{name}.{side}_quantizer" for name in weights for side in ("weight", "input")}
    assert enabled <= named, sorted(enabled - named)  # noqa: S101
    return found


def by_nncf(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    import nncf
    from nncf.torch.function_hook import get_hook_storage

    batch = batches[0]
    scope = imported(folder / "nncf_ignored_scope.py").ignored_scope(model, batch)
    # The name of a node depends on the other nodes of that name, so each module's node is asked for alone.
    node_of = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            one = imported(folder / "nncf_ignored_scope.py")
            one.KEPT = [f"{name}$"]
            node_of[name] = one.ignored_scope(model, batch).names
    assert all(len(nodes) == 1 for nodes in node_of.values()), node_of  # noqa: S101
    quantized = nncf.quantize(model, nncf.Dataset([batch]), ignored_scope=scope, subset_size=1)
    # The second operand of a Linear is its weight. NNCF's preset has 8 bits.
    hooked = {name.removeprefix("pre_hooks.") for name, _ in get_hook_storage(quantized).named_hooks()}
    found = {name for name, (node,) in node_of.items() if any(hook.startswith(f"{node}__1.") for hook in hooked)}
    return dict.fromkeys(found, (8, 8))


def by_torchao(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    in_bfloat16 = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batches[0].items()}
    imported(folder / "torchao_quantize.py").quantize(model, lambda model: model(**in_bfloat16))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {name: module.weight.data for name, module in linears.items()}
    return {name: in_torchao(weight) for name, weight in weights.items() if type(weight) is not torch.Tensor}


def in_torchao(weight: Any) -> tuple[int, int]:
    """The bits of a tensor of torchao: of its values, and of the inputs that it is multiplied with."""
    kind = type(weight).__name__
    if kind == "IntxUnpackedToInt8Tensor":
        return int(str(weight.target_dtype).removeprefix("torch.int")), 16
    if kind == "MXTensor":
        own = {torch.float8_e4m3fn: 8, torch.float4_e2m1fn_x2: 4}[weight.elem_dtype]
    else:
        own = {"Int8Tensor": 8, "Float8Tensor": 8, "PrototypeFloat8Tensor": 8, "NVFP4Tensor": 4}[kind]
    return own, own if weight.act_quant_kwargs is not None else 16


def by_autoround(model: torch.nn.Module, folder: Path, batches: Any) -> Bits:
    """The layer_config as AutoRound resolves it, before any tuning."""
    from auto_round.compressors.config_resolution.contracts import ResolvedScheme
    from auto_round.compressors.layer_config_resolver import resolve_layer_config
    from auto_round.schemes import preset_name_to_scheme

    resolved = resolve_layer_config(
        model=model,
        scheme=ResolvedScheme.from_scheme(preset_name_to_scheme("BF16"), "BF16"),
        layer_config=imported(folder / "autoround_layer_config.py").LAYER_CONFIG,
    )
    return {name: (layer["bits"], layer["act_bits"]) for name, layer in resolved.items() if layer["bits"] < 16}


CHECKS = {
    "compressed-tensors": by_compressed_tensors,
    "llmcompressor": by_llmcompressor,
    "modelopt": by_modelopt,
    "nncf": by_nncf,
    "torchao": by_torchao,
    "autoround": by_autoround,
}

if __name__ == "__main__":
    raise SystemExit(main())
