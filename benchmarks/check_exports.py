"""Load every export in its own tool, quantize the model, and check that only the kept modules stay as they are.

    python benchmarks/check_exports.py [TOOL ...]

There are two models: `digits_vlm`, so run `make run` before, and a tiny Qwen2-VL. Each tool gets a virtual environment
of its own in tmp/, which takes gigabytes. `make quantize` checks INC's export. A tool that cannot be installed, or that
fails, is printed, and the exit code is 1.
"""

import argparse
import importlib.util
import json
import os
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
}
INDEX_OF = {"compressed-tensors": "llm_compressor", "llmcompressor": "llm_compressor"}  # the others have their own name


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
    """Write one calibration batch of `digits_vlm`, because the tools' environments cannot make one."""
    from auto_quantize_model.data.batches import load_batches
    from auto_quantize_model.documents import read_document
    from auto_quantize_model.models.snapshot import load_processor
    from auto_quantize_model.records import CalibrationManifest, as_record

    calibration = as_record(CalibrationManifest, read_document(RUN / "calibration_manifest.json"))
    processor = load_processor(MODELS["digits_vlm"][0], calibration.image_backend)
    batches = load_batches(RUN / "calibration" / "calibration.parquet", calibration, processor)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(batches[0], FOLDER / "digits_vlm.pt")


def make_qwen2_vl() -> None:
    """A tiny Qwen2-VL, a batch and a profile's exports: ModelOpt can quantize the nn.LayerNorm of its vision tower."""
    import transformers

    from auto_quantize_model.export.exports import export
    from auto_quantize_model.inc.plan import inventoried
    from auto_quantize_model.models.coverage import cover
    from auto_quantize_model.records import IncInt8, Plan, Profile, Profiles, Side

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
    batch |= {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    torch.save(batch, FOLDER / "qwen2_vl.pt")
    kept = ["model.visual.blocks.0.mlp.fc1", "model.language_model.layers.0.self_attn.q_proj"]
    modules = {name: type(module) for name, module in model.named_modules()}
    scheme = IncInt8("merger", "Linear", Side({}), Side({}))
    idle = inventoried("model.visual.merger.mlp.0", "Linear", dict(model.named_modules()), scheme)
    two = Profile(2, 0.0, None, None, 0.0, 1.0, None, 0, "ranking", tuple(kept), {}, {})
    plan = Plan(
        model="qwen2_vl",
        engine="replay",
        confidence_batches=1,
        maps=("isolated",),
        keep={"op_type_dict": {}, "op_name_dict": {}},
        reduce_range=False,
        reduce_range_by="config",
        measured_op="lm_head",
        schemes={"inc_int8": {}},
        ops=(replace(idle, executions=(0,)),),
        excluded=(),
        coverage=cover(model, [idle.op_name], []),
        inc_check={"status": "reproduces_fp32"},
        versions={},
    )
    export(exports, Profiles({}, {"two": two}, "", None, None, {}), plan, modules, set(model.state_dict()), 1)


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
    """Quantize each model by each profile's export, and compare the modules in FP32 with the export's index."""
    import transformers

    package = {"modelopt": "nvidia-modelopt"}.get(tool, tool)
    for subject, (snapshot, exports) in MODELS.items():
        batch = torch.load(FOLDER / f"{subject}.pt")
        for profile, tools in json.loads((exports / "index.json").read_text())["profiles"].items():
            model = transformers.AutoModelForImageTextToText.from_pretrained(snapshot, dtype=torch.float32).eval()
            linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
            kept = set(tools[INDEX_OF.get(tool, tool)]["kept"])
            quantized = CHECKS[tool](model, exports / profile, batch)
            assert quantized & linears == linears - kept, sorted((quantized & linears) ^ (linears - kept))  # noqa: S101
            assert not quantized & kept, sorted(quantized & kept)  # noqa: S101
            counts = f"{len(quantized)} modules quantized, {len(kept)} left alone"
            print(f"{tool} {version(package)}: {subject}, {profile}: {counts}")
    return 0


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_compressed_tensors(model: torch.nn.Module, folder: Path, batch: Any) -> set[str]:
    """The recipe's `ignore` and scheme as compressed-tensors applies them, which is what a checkpoint carries."""
    import yaml
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    recipe = yaml.safe_load((folder / "llm_compressor_recipe.yaml").read_text())
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    scheme = preset_name_to_scheme(modifier["scheme"], modifier["targets"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=modifier["ignore"]))
    return with_scheme(model)


def by_llmcompressor(model: torch.nn.Module, folder: Path, batch: Any) -> set[str]:
    """The recipe applied by llm-compressor as its comment says; the checkpoint has no scales of lm_head for vLLM."""
    from llmcompressor import oneshot
    from safetensors import safe_open

    oneshot(model=model, recipe=str(folder / "llm_compressor_recipe.yaml"))
    quantized = with_scheme(model)
    model.save_pretrained(FOLDER / "compressed", save_compressed=True)
    with safe_open(FOLDER / "compressed" / "model.safetensors", "pt") as file:
        tensors = set(file.keys())
    assert sum(name.endswith(".weight_scale") for name in tensors) == len(quantized)  # noqa: S101
    assert {name for name in tensors if "lm_head" in name} == {"lm_head.weight"}  # noqa: S101
    return quantized


def with_scheme(model: torch.nn.Module) -> set[str]:
    """The modules that compressed-tensors quantizes; never lm_head, because vLLM would not load it."""
    found = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert "lm_head" in dict(model.named_modules()) and "lm_head" not in found  # noqa: S101
    return found


def by_modelopt(model: torch.nn.Module, folder: Path, batch: Any) -> set[str]:
    import modelopt.torch.quantization as mtq

    config = json.loads((folder / "modelopt_quant_cfg.json").read_text())
    quantized = mtq.quantize(model, config, lambda model: model(**batch))
    enabled = {name for name, module in quantized.named_modules() if getattr(module, "is_enabled", False)}
    weights, inputs = (
        {name.removesuffix(kind) for name in enabled if name.endswith(kind)}
        for kind in (".weight_quantizer", ".input_quantizer")
    )
    assert weights == inputs, sorted(weights ^ inputs)  # noqa: S101
    assert len(enabled) == len(weights) + len(inputs), sorted(enabled)  # noqa: S101
    return weights


def by_nncf(model: torch.nn.Module, folder: Path, batch: Any) -> set[str]:
    import nncf
    from nncf.torch.function_hook import get_hook_storage

    scope = imported(folder / "nncf_ignored_scope.py").ignored_scope(model, batch)
    # The name of a node depends on the other nodes of that name, so each module's node is asked for alone.
    node_of = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d | torch.nn.Embedding):
            one = imported(folder / "nncf_ignored_scope.py")
            one.KEPT = [f"{name}$"]
            node_of[name] = one.ignored_scope(model, batch).names
    assert all(len(nodes) == 1 for nodes in node_of.values()), node_of  # noqa: S101
    quantized = nncf.quantize(model, nncf.Dataset([batch]), ignored_scope=scope, subset_size=1)
    # The second operand of a Linear and of a convolution is its weight.
    hooked = {name.removeprefix("pre_hooks.") for name, _ in get_hook_storage(quantized).named_hooks()}
    return {name for name, (node,) in node_of.items() if any(hook.startswith(f"{node}__1.") for hook in hooked)}


def by_torchao(model: torch.nn.Module, folder: Path, batch: Any) -> set[str]:
    imported(folder / "torchao_quantize.py").quantize(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name for name, module in linears.items() if type(module.weight.data) is not torch.Tensor}


CHECKS = {
    "compressed-tensors": by_compressed_tensors,
    "llmcompressor": by_llmcompressor,
    "modelopt": by_modelopt,
    "nncf": by_nncf,
    "torchao": by_torchao,
}

if __name__ == "__main__":
    raise SystemExit(main())
