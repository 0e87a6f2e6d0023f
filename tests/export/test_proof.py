"""A checkpoint that was written by a profile is the measured model, bit for bit, once transformers has loaded it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from build import a_frontier, a_model_manifest, a_plan, a_point, a_profile, an_op
from quantized import tiny_language_model, token_batches
from safetensors.torch import load_file, save_file

from auto_quantize_model.export import checkpoint, proof
from auto_quantize_model.export.checkpoint import Shards, Source, require_bytes, write_checkpoint
from auto_quantize_model.files import InputError
from auto_quantize_model.machine import instruction_set
from auto_quantize_model.made.tiny_text import write_tiny_text
from auto_quantize_model.measure.heldout import HeldOut
from auto_quantize_model.measure.store import ScoreStore
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.models.units import unit_of, units_of
from auto_quantize_model.records import Plan, Point
from auto_quantize_model.replay.model import Replay
from auto_quantize_model.report import sentences
from auto_quantize_model.schemes.compressed import refusal, scheme_of, stored_bytes

SCHEMES = ("NVFP4", "FP8_DYNAMIC", "W8A8", "FP8")


def plan_of(model: Any) -> Plan:
    """A plan of all Linears in all schemes that they can have."""
    modules = dict(model.named_modules())
    ops = []
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            shape = tuple(module.weight.shape)
            able = [scheme for scheme in SCHEMES if not refusal(scheme_of(scheme), "Linear", shape)]
            stored = {scheme: stored_bytes(scheme_of(scheme), shape) for scheme in able}
            fields: dict[str, Any] = {"shape": shape, "weight_bytes": 4 * module.weight.numel()}
            fields |= {"unit": unit_of(name, modules), "schemes": ("inc_int8", *able), "stored_bytes": stored}
            ops.append(an_op(name, **fields))
    coverage: Any = {"weights_total": sum(parameter.numel() for parameter in model.parameters())}
    schemes: dict[str, Any] = {"inc_int8": {}, **{name: {} for name in SCHEMES}}
    return a_plan(ops, units=tuple(units_of(ops, modules)), schemes=schemes, coverage=coverage, measured_op="lm_head")


def mixed(plan: Plan) -> dict[str, str]:
    """The units in one scheme after another; each fifth and the head stay unquantized."""
    states = (*SCHEMES, "")
    units = [unit for unit in plan.units if unit.ops != ("lm_head",)]
    return {
        name: states[index % len(states)]
        for index, unit in enumerate(units)
        for name in unit.ops
        if states[index % len(states)]
    }


def promised_bytes(plan: Plan, assignment: Mapping[str, str]) -> int:
    """The bytes of a choice, as the frontier counts them."""
    ops = {op.op_name: op for op in plan.ops}
    saved = sum(ops[name].weight_bytes // 2 - ops[name].stored_bytes[scheme] for name, scheme in assignment.items())
    return 2 * plan.coverage["weights_total"] - saved


class Measured:
    """A snapshot with a mixed assignment, measured on held-out batches as the frontier measures, and written."""

    def __init__(self, snapshot: Path, batches: Any, folder: Path) -> None:
        model, self.folder, self.batches = load_model(snapshot), folder, batches
        self.plan = plan_of(model)
        self.assignment = mixed(self.plan)
        with Replay(model, self.plan.ops, "lm_head") as replay:
            scales = replay.calibrate(*batches)
        self.answers: list[list[range | None]] = [[None] * len(batch["input_ids"]) for batch in batches]
        store = ScoreStore(folder.parent / "scores")
        with HeldOut(model, self.plan, scales, batches, self.answers, store) as heldout:
            (self.promised,) = heldout.measure([self.assignment])
        self.source = Source(snapshot, self.plan, self.assignment, scales)
        folder.mkdir()
        self.written = write_checkpoint(self.source, folder)

    def found(self) -> dict[str, Any]:
        """The metrics of the checkpoint as transformers loads it, after the check of its weights."""
        loaded = proof.load_back(self.folder, self.source)
        proof.require_weights(loaded, self.source)
        return proof.measure_loaded(loaded, self.source, self.batches, self.answers)


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A language model, whose weights were published in BF16."""
    where = tmp_path_factory.mktemp("text")
    tiny_language_model(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(where / "snapshot")
    return Measured(where / "snapshot", token_batches(), where / "checkpoint")


@pytest.fixture(scope="module")
def of_images(tiny_snapshot: Path, batches: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tiny_snapshot, batches, tmp_path_factory.mktemp("images") / "checkpoint")


@pytest.fixture(scope="module", params=["of_text", "of_images"])
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    yield request.getfixturevalue(request.param)


def test_the_loaded_checkpoint_has_the_metrics_that_were_measured_bit_for_bit(measured: Measured) -> None:
    assert set(measured.assignment.values()) == set(SCHEMES)
    found = measured.found()
    assert found == measured.promised
    assert found["divergence"] > 0


def test_the_bytes_are_those_of_the_profile_and_what_is_not_rounded(measured: Measured) -> None:
    promised = promised_bytes(measured.plan, measured.assignment)
    require_bytes(measured.written, promised)
    stored = load_file(measured.folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == measured.written.bytes
    in_fp32 = [tensor for name, tensor in stored.items() if name.endswith(("weight_scale", "input_scale"))]
    more = {checkpoint.IN_FP32: 2 * sum(tensor.numel() for tensor in in_fp32 if tensor.dtype == torch.float32)}
    quantized = {f"{name}.weight" for name in measured.assignment}
    whole = sum(tensor.numel() for name, tensor in load_model(measured.source.directory).named_parameters())
    if stored["model.embed_tokens.weight"].dtype == torch.float32:
        kept = whole - sum(measured.source.weight(name.removesuffix(".weight")).numel() for name in quantized)
        more[checkpoint.UNROUNDED] = 2 * kept
    assert measured.written.more == more
    with pytest.raises(InputError, match=f"take {promised} bytes in BF16, and the profile says {promised - 1}; do not"):
        require_bytes(measured.written, promised - 1)


def test_the_config_names_each_quantized_op_and_each_other_linear(of_images: Measured) -> None:
    config = json.loads((of_images.folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert (quantization["format"], quantization["quantization_status"]) == ("mixed-precision", "compressed")
    groups = quantization["config_groups"].values()
    assert all(group["format"] for group in groups)
    assert sorted(name for group in groups for name in group["targets"]) == sorted(of_images.assignment)
    # The published names too, from which vLLM makes its own.
    unquantized = "model.visual.patch_embed.proj"
    linears = {op.op_name for op in of_images.plan.ops} - set(of_images.assignment)
    assert linears and linears <= set(quantization["ignore"]) and unquantized not in quantization["ignore"]
    assert {name.removeprefix("model.") for name in linears if "visual" in name} <= set(quantization["ignore"])
    others = {"tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in of_images.folder.iterdir()} >= others


def test_a_spoiled_tensor_is_found(of_text: Measured, tmp_path: Path) -> None:
    static = next(name for name, scheme in of_text.assignment.items() if scheme == "FP8")
    for name in ("model.layers.0.self_attn.q_proj.weight_packed", "model.norm.weight", f"{static}.input_scale"):
        folder = tmp_path / name
        folder.mkdir()
        for path in of_text.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[name][0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = proof.load_back(folder, of_text.source)
        with pytest.raises(InputError, match=f"^{name.removesuffix('_packed')} differs in the checkpoint from the"):
            proof.require_weights(loaded, of_text.source)


def test_ops_of_a_unit_share_the_global_scale(of_text: Measured) -> None:
    stored = load_file(of_text.folder / "model.safetensors")
    names = [f"model.layers.0.self_attn.{name}_proj.weight_global_scale" for name in "qkv"]
    assert stored[names[0]] == stored[names[1]] == stored[names[2]]


def test_several_shards_have_an_index_and_load_as_one(of_text: Measured, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Shards.__init__, "__defaults__", (20_000,))
    assert write_checkpoint(of_text.source, tmp_path) == of_text.written
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == of_text.written.bytes and len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    proof.require_weights(proof.load_back(tmp_path, of_text.source), of_text.source)


def test_what_cannot_be_written_is_refused_by_name(of_text: Measured) -> None:
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(
        InputError, match=f"^{name}: a checkpoint cannot be written in the scheme inc_int8; use a preset"
    ):
        replace(of_text.source, assignment={name: "inc_int8"}).schemes  # noqa: B018
    with pytest.raises(InputError, match="^lm_head: .* holds no tensor with the weight of this op alone"):
        replace(of_text.source, assignment={"lm_head": "W8A8"}).schemes  # noqa: B018
    with pytest.raises(InputError, match=f"^{name}: FP8 has static inputs, and the calibration saw none;"):
        replace(of_text.source, assignment={name: "FP8"}, scales={}).inputs(name)


def quantized(measured: Measured, folder: Path, **changes: Any) -> dict[str, Any]:
    """The record of the whole step, for a profile whose point has other numbers if asked."""
    size = promised_bytes(measured.plan, measured.assignment)
    point = a_point(["NVFP4"], **{**measured.promised, "weight_bytes": size, **changes})
    frontier = a_frontier(["a"], [point], device="cpu", instruction_set=instruction_set(), threads=1)
    profile = a_profile(point, assignment=measured.assignment, kept=("lm_head",))
    manifest = a_model_manifest(architecture="Qwen2ForCausalLM", rounded="Weights were rounded to 4 bits.")
    heldout = measured.batches, measured.answers
    return proof.quantize(measured.source, folder, manifest, "balanced", profile, frontier, *heldout)


def test_the_folder_holds_the_proved_checkpoint_and_its_readme(of_text: Measured, tmp_path: Path) -> None:
    record = quantized(of_text, tmp_path / "a, b")
    assert (record["kind"], record["status"], record["profile"]) == ("checkpoint", "bit_identical", "balanced")
    assert record["promised"] == record["found"] and record["bytes"]["bytes"] == of_text.written.bytes
    told = sentences.quantized(record, "here")
    assert told.startswith(
        "The checkpoint by the profile balanced: here. Loaded back, its error on held-out samples is bit"
    )
    readme = (tmp_path / "a, b" / "README.md").read_text()
    assert f"vllm serve '{tmp_path}/a, b'" in readme and "were not run" in readme and "lm_eval --model vllm" in readme
    assert "| `FP8_DYNAMIC` |" in readme and "| unquantized | 1 |" in readme and "rounded to 4 bits" in readme
    # With the dtype of its config, which is what a user gets.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a, b")
    with torch.no_grad():
        logits = loaded(**of_text.batches[0]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"divergence": 0.5}, "divergence was measured as 0.5"), ({"weight_bytes": 1}, "and the profile says 1;")],
)
def test_nothing_is_left_of_a_checkpoint_that_breaks_its_promise(
    of_text: Measured, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        quantized(of_text, tmp_path / "checkpoint", **changes)
    assert list(tmp_path.iterdir()) == []


def promise(**changes: Any) -> Point:
    return a_point(["NVFP4"], 0.01, divergence_low=0.008, divergence_high=0.012, **changes)


def test_other_numbers_are_refused_here_and_compared_with_the_interval_elsewhere() -> None:
    profile = a_profile(promise())
    here = a_frontier(["a"], [promise()], device="cpu", instruction_set=instruction_set())
    elsewhere = replace(here, device="cuda")
    found = {"divergence": 0.01, "accuracy": None}
    assert proof.promised_and_found("balanced", profile, found, here)["status"] == "bit_identical"
    assert proof.promised_and_found("balanced", profile, found, elsewhere)["status"] == "bit_identical"
    near = found | {"divergence": 0.0101}
    record = proof.promised_and_found("balanced", profile, near, elsewhere)
    assert (record["status"], record["promised"], record["found"]) == ("measured_elsewhere", found, near)
    with pytest.raises(InputError, match="profile balanced: divergence was measured as 0.01, and the quantized model"):
        proof.promised_and_found("balanced", profile, near, here)
    with pytest.raises(
        InputError, match="divergence of 0.013 nats on the held-out samples, and the profile's interval"
    ):
        proof.promised_and_found("balanced", profile, found | {"divergence": 0.013}, elsewhere)


@pytest.mark.parametrize(
    ("model_type", "op_name"),
    [
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj.0"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),  # its weight is transposed
        ("mixtral", "lm_head"),
    ],
)
def test_an_op_that_is_no_linear_of_the_model_is_not_stored_quantized(
    model_type: str, op_name: str, tmp_path: Path
) -> None:
    snapshot = write_tiny_text(model_type, tmp_path)
    model: Any = load_model(snapshot)
    plan = plan_of(model)
    assert op_name in plan.op_names
    source = Source(snapshot, plan, {op_name: "FP8_DYNAMIC"}, {})
    if op_name == "lm_head":
        assert list(source.schemes) == ["lm_head"]
        return
    with pytest.raises(InputError, match=rf"^{op_name}: .*; keep the op unquantized with decide.fixed$"):
        source.schemes  # noqa: B018
