"""A checkpoint of compressed-tensors is a scheme: what is read, what goes with an op, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from build import a_plan, an_op
from loopback_hub import serving
from quantized import Modules, tiny_language_model, token_batches, write_checkpoint
from safetensors.torch import load_file, save_file

from auto_quantize_model.files import InputError
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.models.checkpoint import (
    Checkpoint,
    described,
    folder_of,
    is_scaled,
    open_checkpoint,
    read_checkpoint,
)
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.records import Op
from auto_quantize_model.replay.model import Replay, goes_along
from auto_quantize_model.schemes.compressed import PRESETS, fields_of, quantized_weight, scheme_of, weight_parameters
from auto_quantize_model.schemes.scheme import assigned

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
OWN = {
    "INT4": {"weights": INT4},
    "INT4_ASYM": {"weights": INT4 | {"symmetric": False}},
    "INT3_CHANNEL": {"weights": {"num_bits": 3, "type": "int", "strategy": "channel"}},
    "FP8_BLOCKS": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 32]},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    },
    "INT8_STATIC": {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False},
    },
}
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
NORM = "model.layers.0.input_layernorm"


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def int4(model, tmp_path_factory) -> Path:
    return write_checkpoint(model, tmp_path_factory.mktemp("int4") / "checkpoint", scheme_of("INT4", OWN["INT4"]))


def ops_of(model: Any, checkpoint: Checkpoint) -> list[Op]:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    able = {
        name: ("inc_int8", "mine") if not checkpoint.refusal(name, "Linear") else ("inc_int8",) for name, _ in linears
    }
    return [an_op(name, shape=tuple(module.weight.shape), schemes=able[name]) for name, module in linears]


def opened(folder: Path, model: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint as later steps open it, and the fields of the plan."""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    fields = described(read_checkpoint(str(folder), folder, model), linears, model, token_batches())
    fields = json.loads(json.dumps(fields))
    return open_checkpoint(fields, model), fields


def outputs(model: Any, checkpoint: Checkpoint, *states: list[str]) -> list[torch.Tensor]:
    """The replay's outputs with the named ops as in the checkpoint; each is the library's, bit for bit."""
    ops, (batch, _) = ops_of(model, checkpoint), token_batches()
    library = Library(model, a_plan(ops), {"mine": checkpoint}, {})
    with Replay(model, ops, "lm_head", schemes={"mine": checkpoint}) as replay:
        replay.calibrate(batch)
        fp32 = replay.begin(batch).clone()
        found = [replay.run(assigned(names, "mine")).clone() for names in states]
        assert torch.equal(replay.run({}), fp32)
        replay.together = 3
        each = [output.clone() for output in replay.run_each([assigned(names, "mine") for names in (*states, [])])]
        assert all(map(torch.equal, each, [*found, fp32]))
    for names, output in zip(states, found, strict=True):
        assert torch.equal(library.logits(batch, assigned(names, "mine")), output)
        assert not torch.equal(output, fp32)
    assert not any(module._forward_pre_hooks for module in model.modules())
    return found


def of_transformers(folder: Path) -> torch.Tensor:
    """The logits of the checkpoint as transformers loads it."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = loaded(**token_batches()[0]).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [*OWN, "FP8", "FP8_DYNAMIC", "W8A8", "NVFP4", "NVFP4A16", "MXFP4", "MXFP6A16", "MXFP8"]
)
def test_each_op_has_the_weight_and_the_input_that_the_checkpoint_holds(model, tmp_path, name, dtype) -> None:
    scheme = scheme_of(name, OWN.get(name))
    checkpoint, fields = opened(write_checkpoint(model, tmp_path / "c", scheme, dtype=dtype), model)
    assert len(checkpoint.schemes) == 14 and fields["norms"] == {} and fields["warnings"] == []
    for op, found in checkpoint.schemes.items():
        assert fields_of(found) == fields_of(scheme)
        weight = model.get_submodule(op).weight.detach().to(torch.bfloat16 if "NVFP4" in name else dtype)
        parameters = weight_parameters(weight, scheme.weights)
        if dtype == torch.bfloat16 or "FP4" not in name:  # those are decompressed to BF16, and scales were made in FP32
            assert torch.equal(checkpoint.weight(op), quantized_weight(weight, scheme.weights, parameters).float())
        stored = checkpoint.inputs(op)
        assert (stored is not None) == (name in ("FP8", "NVFP4", "INT8_STATIC"))
    everything = list(checkpoint.schemes)
    outputs(model, checkpoint, everything, everything[:1], everything[-2:])


@pytest.mark.parametrize("name", ["INT4", "FP8", "W8A8"])
def test_all_ops_together_are_the_model_that_transformers_loads(model, tmp_path, name) -> None:
    folder = write_checkpoint(model, tmp_path / "c", scheme_of(name, OWN.get(name)))
    checkpoint, _ = opened(folder, model)
    (everything,) = outputs(model, checkpoint, list(checkpoint.schemes))
    assert torch.equal(everything, of_transformers(folder))


def test_ops_of_one_checkpoint_can_have_different_schemes(model, tmp_path) -> None:
    groups = {"re:.*self_attn.*": "FP8", r"re:.*layers\.1\.mlp\.(gate|up)_proj": "NVFP4", "Linear": "W8A8"}
    schemes = {target: scheme_of(name) for target, name in groups.items()}
    checkpoint, _ = opened(write_checkpoint(model, tmp_path / "c", schemes), model)
    assert (
        json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["format"] == "mixed-precision"
    )
    for op, found in checkpoint.schemes.items():
        name = "FP8" if "self_attn" in op else "NVFP4" if "layers.1" in op and "down" not in op else "W8A8"
        assert fields_of(found) == fields_of(scheme_of(name)), op
    everything = list(checkpoint.schemes)
    outputs(model, checkpoint, everything, everything[::2])


def smoothed(norm: str, linears: list[str]) -> Callable[[Modules], None]:
    """Divides a norm's weight by a factor for each column, and multiplies the columns of linears by it."""

    def change(modules: Modules) -> None:
        factors = torch.logspace(-1, 1, modules[norm].weight.numel()).flip(0).to(modules[norm].weight.dtype)
        modules[norm].weight.data /= factors
        for name in linears:
            modules[name].weight.data *= factors

    return change


def test_a_norm_that_smoothing_changed_goes_with_its_ops_alone(model, tmp_path) -> None:
    scheme = scheme_of("INT8_STATIC", OWN["INT8_STATIC"])
    folder = write_checkpoint(model, tmp_path / "c", scheme, before=smoothed(NORM, ATTENTION))
    checkpoint, fields = opened(folder, model)
    assert fields["norms"] == {NORM: sorted(ATTENTION)} and fields["warnings"] == []
    assert all(goes_along(model, NORM, op) for op in ATTENTION)
    q_proj, *others = ATTENTION
    everything, alone, _ = outputs(model, checkpoint, list(checkpoint.schemes), [q_proj], others)
    # The whole is the checkpoint's model.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(everything, loaded(**token_batches()[0]).logits)
        fp32 = model(**token_batches()[0]).logits
    # An op alone errs by its own rounding. With the model's norm, its scaled columns would err by a factor.
    checkpoint.norms.clear()
    (torn,) = outputs(model, checkpoint, [q_proj])
    assert (alone - fp32).norm() < 0.2 * (torn - fp32).norm()


def test_a_changed_norm_outside_of_all_blocks_goes_with_the_head(model, tmp_path) -> None:
    """States that advance together come to the head one after another, all of them behind the norm."""
    scheme = scheme_of("INT8_STATIC", OWN["INT8_STATIC"])
    folder = write_checkpoint(model, tmp_path / "c", scheme, before=smoothed("model.norm", ["lm_head"]), ignore=[])
    checkpoint, fields = opened(folder, model)
    assert fields["norms"] == {"model.norm": ["lm_head"]}
    outputs(model, checkpoint, ["lm_head"], list(checkpoint.schemes), ["lm_head", *ATTENTION])


def test_a_norm_that_feeds_an_unquantized_op_is_refused(model, tmp_path) -> None:
    def change(modules: Modules) -> None:
        modules[NORM].weight.data *= 2

    scheme = scheme_of("INT4", OWN["INT4"])
    folder = write_checkpoint(model, tmp_path / "c", scheme, ignore=["lm_head", ATTENTION[1]], before=change)
    with pytest.raises(
        InputError, match=rf"the checkpoint changes {NORM}\.weight, and its output goes to {ATTENTION[1]},"
    ):
        opened(folder, model)


def test_a_head_that_shares_the_weight_of_the_embedding_is_not_missed(tmp_path) -> None:
    tied = tiny_language_model(tie_word_embeddings=True)
    checkpoint, _ = opened(write_checkpoint(tied, tmp_path / "c", scheme_of("INT4", OWN["INT4"])), tied)
    assert "lm_head" not in checkpoint.schemes and len(checkpoint.schemes) == 14


def test_smoothing_between_two_ops_is_told_by_name(model, tmp_path) -> None:
    def change(modules: Modules) -> None:
        modules["model.layers.1.mlp.up_proj"].weight.data *= torch.logspace(-1, 1, 128).unsqueeze(1)
        modules["model.layers.1.mlp.down_proj"].weight.data /= torch.logspace(-1, 1, 128)

    folder = write_checkpoint(model, tmp_path / "c", scheme_of("INT8", None), before=change)
    _, fields = opened(folder, model)
    (warning,) = fields["warnings"]
    assert fields["scaled"] == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert warning.startswith(
        "the weights of model.layers.1.mlp.down_proj, model.layers.1.mlp.up_proj are scaled against"
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("W2")])
def test_rounding_alone_is_not_taken_for_smoothing(name) -> None:
    own = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 256)
    scheme = scheme_of(name).weights
    weight = quantized_weight(own, scheme, weight_parameters(own, scheme))
    assert not any(is_scaled(weight, own, axis) for axis in (0, 1))
    assert is_scaled(weight * torch.logspace(-1, 1, 128).unsqueeze(1), own, 1)


def test_an_op_that_stays_unquantized_is_refused_by_name(model, tmp_path) -> None:
    ignore = ["lm_head", "re:.*layers.1.mlp.up_proj"]
    folder = write_checkpoint(model, tmp_path / "c", scheme_of("INT4", OWN["INT4"]), ignore=ignore)
    checkpoint, _ = opened(folder, model)
    refused = [op.op_name for op in ops_of(model, checkpoint) if op.schemes == ("inc_int8",)]
    assert refused == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert checkpoint.refusal("lm_head", "Linear") == "the checkpoint leaves the op unquantized"
    assert "this op is of the type Embedding" in checkpoint.refusal("model.embed_tokens", "Embedding")


def test_a_checkpoint_of_a_model_with_images_is_matched_under_the_names_of_its_files(tiny_snapshot, tmp_path) -> None:
    model = load_model(tiny_snapshot)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    made = transformers.AutoModelForImageTextToText.from_pretrained(tiny_snapshot, dtype=torch.float32)
    folder = write_checkpoint(
        made, tmp_path / "c", scheme_of("INT8"), ignore=["re:.*visual.*", "lm_head"], calibrate=False
    )
    checkpoint = read_checkpoint("mine", folder, model)
    assert set(checkpoint.schemes) == {name for name in linears if "visual" not in name and name != "lm_head"}
    assert described(checkpoint, linears, model, [])["warnings"] == []


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("quantization_config"), "config.json has no quantization_config; name a checkpoint that"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "quantized by 'gptq', and only"),
        (
            lambda c: c["quantization_config"].update(transform_config={"config_groups": {"u": {}}}),
            "has a transform_config",
        ),
        (
            lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-bitmask"}),
            "has a sparsity_config",
        ),
        (lambda c: c["quantization_config"].update(quantization_status="frozen"), "quantization_status is frozen, so"),
        (
            lambda c: c["quantization_config"].update(ignore=["Linear"]),
            "no group of the checkpoint's config matches it",
        ),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
            "group_0 quantizes outputs, which is not covered",
        ),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(actorder="group"),
            "quantization_config.config_groups.group_0",
        ),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"].update(format="marlin-24"),
            "model.layers.0.mlp.down_proj is stored in the format marlin-24, and compressed-tensors reads mxfp4-pack-",
        ),
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "is of the architecture ['LlamaForCausalLM'], and"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(model, int4, tmp_path, change, said) -> None:
    folder = edited(int4, tmp_path / "c", change)
    with pytest.raises(InputError) as refused:
        read_checkpoint("mine", folder, model)
    assert str(refused.value).startswith("mine: ") and said in str(refused.value)


def with_tensors(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t["model.embed_tokens.weight"].mul_(2),
            "the checkpoint changes model.embed_tokens.weight. No op can",
        ),
        (lambda t: t["lm_head.weight"].add_(1), "the checkpoint changes lm_head.weight. No op can"),
        (lambda t: t["model.norm.weight"].mul_(2), "model.norm.weight, and its output goes to lm_head, which is not a"),
        (lambda t: t.pop("model.norm.weight"), "the files lack model.norm.weight"),
        (lambda t: t.update({"model.more.weight": torch.ones(1)}), "the model has no model.more.weight"),
        (lambda t: t.update({f"{Q_PROJ}.weight_g_idx": torch.ones(64)}), f"{Q_PROJ}.weight_g_idx: tensors that"),
        (lambda t: t.pop(f"{Q_PROJ}.weight_packed"), f"compressed-tensors cannot decompress {Q_PROJ} ("),
        (lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(torch.nan), f"the weight of {Q_PROJ} is not finite"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(62, 64)}),
            "lm_head.weight is [62, 64], and the model's is [61, 64]",
        ),
    ],
)
def test_tensors_that_no_op_can_take_along_are_refused_by_name(model, int4, tmp_path, change, said) -> None:
    with pytest.raises(InputError) as refused:
        opened(with_tensors(int4, tmp_path / "c", change), model)
    assert said in str(refused.value)


def test_a_checkpoint_of_other_shapes_is_refused(model, tmp_path) -> None:
    other = tiny_language_model(intermediate_size=160)
    other.model.embed_tokens.weight.data, other.lm_head.weight.data = (
        model.model.embed_tokens.weight,
        model.lm_head.weight,
    )
    folder = write_checkpoint(other, tmp_path / "c", scheme_of("INT4", OWN["INT4"]))
    with pytest.raises(
        InputError, match=r"the weight of model.layers.0.mlp.gate_proj is \[160, 64\], and the model's is"
    ):
        opened(folder, model)


def test_a_static_input_without_a_scale_is_refused(model, tmp_path) -> None:
    whole = write_checkpoint(model, tmp_path / "whole", scheme_of("FP8"))
    lacking = with_tensors(whole, tmp_path / "c", lambda tensors: tensors.pop(f"{Q_PROJ}.input_scale"))
    with pytest.raises(
        InputError, match=f"no finite input_scale of {Q_PROJ}, whose inputs are static; calibrate again"
    ):
        opened(lacking, model)


def test_a_quantized_kv_cache_is_told(model, int4, tmp_path) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    named = edited(int4, tmp_path / "a", lambda config: config["quantization_config"].update(kv_cache_scheme=cache))
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = with_tensors(named, tmp_path / "b", lambda tensors: tensors.update(scale))
    assert opened(folder, model)[1]["warnings"] == ["the checkpoint quantizes the KV cache too, which is not measured"]


def test_a_checkpoint_that_changed_since_the_plan_is_refused(model, int4, tmp_path) -> None:
    folder = with_tensors(int4, tmp_path / "c", lambda tensors: None)
    _, fields = opened(folder, model)
    (folder / "generation_config.json").write_text("{}")  # not read
    open_checkpoint(fields, model)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        InputError, match=r"model.safetensors: differs from the sha256 in the plan; restore the file, or"
    ):
        open_checkpoint(fields, model)
    path.unlink()
    with pytest.raises(InputError, match="model.safetensors: listed in the plan but missing"):
        open_checkpoint(fields, model)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(
        InputError, match="^gone/x: no such folder; name the folder of a checkpoint, or owner/name@commit"
    ):
        folder_of("gone/x")


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_is_fetched_once_into_a_link(int4, tmp_path) -> None:
    # A process of its own, because huggingface_hub reads the hub's address when it is imported.
    code = f"""
from auto_quantize_model.models import hub
from auto_quantize_model.models.checkpoint import folder_of
folder = folder_of("org/tiny@{"7" * 40}")
hub.fetch_snapshot = None  # the second time nothing is asked
assert folder_of("org/tiny@{"7" * 40}") == folder
"""
    with serving() as hub:
        hub.repositories["model", "org/tiny", "7" * 40] = int4
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    link = tmp_path / "resources" / "models" / f"org--tiny--{'7' * 40}"
    assert link.is_symlink() and (link / "model.safetensors").read_bytes() == (int4 / "model.safetensors").read_bytes()
