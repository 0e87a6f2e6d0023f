"""Every export loaded by its own tool: the tool quantizes the model, and leaves exactly the kept modules alone.

    python benchmarks/check_exports.py [TOOL ...]

Each tool gets a virtual environment of its own below tmp/, so gigabytes are installed; run `make run` before. INC's
export is checked by `make quantize`. What cannot be installed or fails is printed as such and ends the check with 1.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RUN = Path("results/digits_vlm/digits")
SNAPSHOT = Path("resources/models/digits_vlm")
FOLDER = Path("tmp/check_exports")
# What pip is asked for, one call after another.
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
    return max([in_its_environment(tool) for tool in args.tools])


def keep_batch() -> None:
    """One calibration batch on disk: the tools' environments have no means to make one."""
    from auto_quantize_model.calibration import load_batches
    from auto_quantize_model.files import read_json
    from auto_quantize_model.snapshot import load_processor

    calibration = read_json(RUN / "calibration_manifest.json")
    processor = load_processor(SNAPSHOT, calibration["image_backend"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(
        load_batches(RUN / "calibration" / "calibration.parquet", calibration, processor)[0], FOLDER / "batch.pt"
    )


def in_its_environment(tool: str) -> int:
    """Install a tool beside this project's torch and transformers, and run the check there."""
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
    # NNCF compiles an extension and by default gives up after a minute.
    surroundings = os.environ | {"NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
    ended = subprocess.run([python, __file__, tool, "--inside"], stdout=subprocess.PIPE, text=True, env=surroundings)
    print(ended.stdout if not ended.returncode else f"{tool}: FAILED\n{ended.stdout}", end="", flush=True)
    return ended.returncode


def check(tool: str) -> int:
    """Quantize the model by each profile's export and compare what is left in FP32 with the export's index."""
    import transformers

    index = json.loads((RUN / "exports_cpu" / "index.json").read_text())
    package = {"modelopt": "nvidia-modelopt"}.get(tool, tool)
    for profile, tools in index["profiles"].items():
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(SNAPSHOT, dtype=torch.float32).eval()
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        kept = set(tools[INDEX_OF.get(tool, tool)]["kept"])
        quantized = CHECKS[tool](model, RUN / "exports_cpu" / profile)
        assert quantized & linears == linears - kept, sorted((quantized & linears) ^ (linears - kept))  # noqa: S101
        assert not quantized & kept, sorted(quantized & kept)  # noqa: S101
        print(f"{tool} {version(package)}: {profile}, {len(quantized)} modules quantized, {len(kept)} left alone")
    return 0


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_compressed_tensors(model: torch.nn.Module, folder: Path) -> set[str]:
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
    return {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def by_llmcompressor(model: torch.nn.Module, folder: Path) -> set[str]:
    """The recipe read and applied by llm-compressor."""
    from llmcompressor.core import State
    from llmcompressor.recipe import Recipe

    recipe = Recipe.create_instance(str(folder / "llm_compressor_recipe.yaml"))
    state = State(model=model)
    for modifier in recipe.modifiers:
        modifier.initialize(state)
    return {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def by_modelopt(model: torch.nn.Module, folder: Path) -> set[str]:
    import modelopt.torch.quantization as mtq

    batch = torch.load(FOLDER / "batch.pt")
    config = json.loads((folder / "modelopt_quant_cfg.json").read_text())
    quantized = mtq.quantize(model, config, lambda model: model(**batch))
    return {
        name.removesuffix(".weight_quantizer")
        for name, module in quantized.named_modules()
        if name.endswith(".weight_quantizer") and module.is_enabled
    }


def by_nncf(model: torch.nn.Module, folder: Path) -> set[str]:
    import nncf
    from nncf.torch.function_hook import get_hook_storage

    batch = torch.load(FOLDER / "batch.pt")
    scope = imported(folder / "nncf_ignored_scope.py").ignored_scope(model, batch)
    # A node is named by its place among those of its name, so each module's own node is asked for by itself.
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


def by_torchao(model: torch.nn.Module, folder: Path) -> set[str]:
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
