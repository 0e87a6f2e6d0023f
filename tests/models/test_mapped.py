"""Weights that stay in the file in BF16 or F16 give the bits of an FP32 model, and take no memory of their own."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import a_plan, an_op
from tiny_models import LIMITS, noise, sample, stored_in
from transformers import AutoModelForCausalLM

from auto_quantize_model.made.tiny import write_tiny
from auto_quantize_model.made.tiny_text import small_config, write_tiny_text
from auto_quantize_model.measure.folding import folding_of
from auto_quantize_model.measure.probes import probe
from auto_quantize_model.measure.served_audit import Library
from auto_quantize_model.measure.why import weight_facts
from auto_quantize_model.models.encode import encode
from auto_quantize_model.models.experts import StackedLinear
from auto_quantize_model.models.mapped import Mapped, held, in_fp32
from auto_quantize_model.models.snapshot import load_model, load_processor, stored_weights
from auto_quantize_model.models.units import members_of, unit_of
from auto_quantize_model.records import Op
from auto_quantize_model.replay.altered import Alteration, Altered
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import TOGETHER, Batch, Replay
from auto_quantize_model.replay.ops import refusal
from auto_quantize_model.replay.served import Kept, LastInput
from auto_quantize_model.schemes.compressed import scheme_of
from auto_quantize_model.schemes.scheme import assigned

SCHEMES = {name: scheme_of(name) for name in ("W8A8", "FP8_DYNAMIC", "NVFP4", "FP8")}
KINDS = {
    torch.nn.Linear: "Linear",
    torch.nn.Embedding: "Embedding",
    torch.nn.Conv3d: "Conv3d",
    StackedLinear: "Experts",
}


def tied(directory: Path) -> Path:
    """A text model whose head is its embedding."""
    config = small_config("llama", 61, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


WRITTEN: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": lambda directory: write_tiny("qwen2_5_vl", directory),
    "tied": tied,
    "gpt2": lambda directory: write_tiny_text("gpt2", directory),
    "mixtral": lambda directory: write_tiny_text("mixtral", directory),
}


def ops_of(model: torch.nn.Module, batch: Batch) -> list[Op]:
    """Each plain module with a matrix that a site can run, in INC's scheme too except experts that are one op."""
    modules = dict(model.named_modules())
    ran: list[str] = []
    for name, module in modules.items():
        if type(module) in KINDS:
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    model(**batch)
    found = []
    for name in dict.fromkeys(ran):
        kind, schemes = KINDS[type(modules[name])], ("inc_int8", *SCHEMES)
        schemes = {"Linear": schemes, "Experts": tuple(SCHEMES)}.get(kind, ("inc_int8",))
        op = an_op(name, kind, schemes=schemes, shape=tuple(modules[name].weight.shape), unit=unit_of(name, modules))
        if kind == "Experts":
            op = Op(**{**vars(op), "inc_int8": None})
        if not refusal(modules[name], op):
            found.append(op)
    return found


def batch_for(name: str, directory: Path) -> Batch:
    if name == "qwen2_5_vl":
        return encode(sample(noise(60, 40)), load_processor(directory), LIMITS)
    return {"input_ids": torch.arange(3, 27)[None]}


@torch.no_grad()
def measured(model: Any, batch: Batch) -> dict[str, Any]:
    """Scales, outputs in the state of all ops and of one op in each scheme, and the products of probes."""
    ops = ops_of(model, batch)
    found: dict[str, Any] = {"ops": [(op.op_name, op.shape, op.unit) for op in ops], "dtype": model.dtype}
    names = {scheme: [op.op_name for op in ops if scheme in op.schemes] for scheme in ("inc_int8", *SCHEMES)}
    with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
        found["scales"] = replay.calibrate(batch)
        found["logits"] = replay.begin(batch).clone()
        for scheme, of_scheme in names.items():
            found[f"all {scheme}"] = replay.run(assigned(of_scheme, scheme)).clone()
            found[f"one {scheme}"] = replay.run({of_scheme[len(of_scheme) // 2]: scheme}).clone()
            found[f"each {scheme}"] = []
            for output in replay.run_each([{name: scheme} for name in reversed(of_scheme)]):
                found[f"each {scheme}"].append((output.clone(), replay.routing_agreement()))
        wanted = {op.op_name: ([op.op_name], [name for name in op.schemes if op.op_type == "Linear"]) for op in ops}
        found["probes"] = probe(replay, {name: asked for name, asked in wanted.items() if asked[1]}, [1, 2])
        state = assigned(names["FP8_DYNAMIC"], "FP8_DYNAMIC")
        asked = {name: ["FP8", "unquantized"] for name in names["FP8_DYNAMIC"]}
        backward = Backward(replay, asked, 1, state)
        found["around"] = backward.run(lambda output, index: output * 1e-3, lambda done, total: None)
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and any(isinstance(part, torch.Tensor | dict | list | tuple) for part in one):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


CASES = [(name, "each", torch.bfloat16) for name in WRITTEN]
CASES += [("mixtral", "block", torch.bfloat16), ("gpt2", "each", torch.float16), ("tied", "each", torch.float32)]


@pytest.mark.parametrize(("name", "experts", "dtype"), CASES)
def test_all_that_is_measured_has_the_bits_of_the_fp32_model(
    name: str, experts: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = stored_in(dtype, WRITTEN[name](tmp_path / name))
    plain, mapped = load_model(directory, experts), load_model(directory, experts, mapped=True)
    for (own, here), (other, there) in zip(plain.named_parameters(), mapped.named_parameters(), strict=True):
        assert (own, here.shape, here.dtype, here.stride()) == (other, there.shape, there.dtype, there.stride())
        assert isinstance(there, Mapped) == (here.ndim > 1 and dtype != torch.float32)
        assert torch.equal(here, in_fp32(there))
    batch = batch_for(name, directory)
    expected, found = measured(plain, batch), measured(mapped, batch)
    assert expected["ops"] and {key for key in expected if not equal(expected[key], found[key])} == set()
    assert not torch.equal(found["logits"], found["all FP8"])


def test_a_tied_weight_stays_one_weight(tmp_path: Path) -> None:
    model = load_model(stored_in(torch.bfloat16, tied(tmp_path / "tied")), mapped=True)
    modules = dict(model.named_modules())
    assert modules["lm_head"].weight is modules["model.embed_tokens"].weight
    assert members_of("lm_head", modules) == (["model.embed_tokens", "lm_head"], True)


def test_causes_and_cures_have_the_bits_of_the_fp32_model(tmp_path: Path) -> None:
    directory = stored_in(torch.bfloat16, write_tiny_text("mistral", tmp_path / "tiny"))
    models = load_model(directory), load_model(directory, mapped=True)
    unit = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    batch = {"input_ids": torch.arange(3, 27)[None]}
    scheme, x = SCHEMES["NVFP4"], torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    alteration = Alteration(scheme.weights, None, scale=torch.linspace(0.5, 2, 64), narrow=True)
    found = []
    for model in models:
        modules = dict(model.named_modules())
        weights = {name: modules[name].weight for name in unit}
        altered = Altered(modules[unit[0]], alteration, list(weights.values()), Kept(), LastInput())
        folded = folding_of(model, unit, "lm_head", batch)
        found.append((weight_facts(weights, scheme), folded, altered(x)))
    assert found[0][:2] == found[1][:2] and found[1][1] == ("model.layers.1.input_layernorm", "")
    assert torch.equal(found[0][2], found[1][2])


def test_the_library_audits_a_mapped_model(tmp_path: Path) -> None:
    directory = stored_in(torch.bfloat16, write_tiny_text("mixtral", tmp_path / "tiny"))
    model, batch = load_model(directory, "block", mapped=True), {"input_ids": torch.arange(3, 27)[None]}
    ops = [op for op in ops_of(model, batch) if op.op_type != "Embedding"]
    with Replay(model, ops, "lm_head") as replay:
        seen = replay.calibrate(batch)
    library = Library(model, a_plan(ops), SCHEMES, seen)
    states = [assigned([op.op_name for op in ops], scheme) for scheme in SCHEMES]
    expected = [library.logits(batch, state) for state in states]
    with Replay(model, ops, "lm_head", schemes=SCHEMES) as replay:
        replay.set_scales(seen)
        replay.begin(batch)
        for state, output in zip(states, expected, strict=True):
            assert torch.equal(replay.run(state), output)
    assert all(isinstance(weight, Mapped) for weight in model.parameters() if weight.ndim > 1)


def test_the_headers_tell_what_stays_in_the_files(tmp_path: Path) -> None:
    dense = stored_weights(stored_in(torch.bfloat16, write_tiny_text("llama", tmp_path / "dense")))
    assert dense.merged == 0 and dense.largest == 262 * 64
    stored = write_tiny_text("mixtral", tmp_path / "mixtral")
    experts = 2 * 4 * 3 * 64 * 96  # of two layers, four experts, and three matrices, which are stored one by one
    assert [stored_weights(stored_in(dtype, stored)).merged for dtype in (torch.bfloat16, torch.float32)] == [
        2 * experts,
        4 * experts,
    ]


def a_weight(*shape: int) -> tuple[torch.Tensor, Mapped]:
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return stored.float(), Mapped(stored)


def test_views_are_mapped_and_every_other_use_has_fp32_values_of_its_own() -> None:
    plain, weight = a_weight(6, 8)
    assert weight.dtype == torch.float32 and weight.element_size() == 4 and weight.shape == (6, 8)
    for view in (lambda w: w.t(), lambda w: w[2], lambda w: w[:, 2:5], lambda w: w.view(2, 3, 8).transpose(1, 2)):
        assert isinstance(view(weight), Mapped) and view(weight).stride() == view(plain).stride()
        assert torch.equal(view(weight) * 1, view(plain))
    kept = weight * 1, weight @ plain.t(), weight[torch.tensor([1, 1])], weight.double()
    a_weight(6, 8)[1].abs()  # fills the same memory with other values
    for found, expected in zip(kept, (plain, plain @ plain.t(), plain[[1, 1]], plain.double()), strict=True):
        assert type(found) is torch.Tensor and torch.equal(found, expected)
    both = torch.stack([weight, weight])
    assert isinstance(both, Mapped) and torch.equal(both @ plain.t(), torch.stack([plain, plain]) @ plain.t())
    assert torch.equal(torch.cat([weight, plain]), torch.cat([plain, plain]))
    assert torch.equal(weight.mul(weight), plain * plain)  # two mapped tensors in one function


def test_a_backward_pass_holds_no_fp32_copy() -> None:
    plain, weight = a_weight(6, 8)
    gradients = []
    for matrix in (plain, weight):
        x = torch.ones(2, 8, requires_grad=True)
        output = torch.nn.functional.linear(x, matrix)
        if matrix is weight:
            assert isinstance(output.grad_fn._saved_mat2, Mapped)
        gradients.append(torch.autograd.grad(output.square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_a_mapped_weight_cannot_be_changed() -> None:
    weight = a_weight(6, 8)[1]
    with pytest.raises(RuntimeError, match="would write into a weight that is mapped from a file"):
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="values of a weight that is mapped from a file cannot be set"):
        weight.data = torch.zeros(6, 8)
    torch.nn.ParameterList([torch.nn.Parameter(weight, requires_grad=False)]).to("cpu")  # changes nothing


def test_a_weight_becomes_fp32_once_while_it_is_held() -> None:
    plain, weight = a_weight(6, 8)
    whole, view = weight.t(), weight[:, 2:5]
    with held():
        first = in_fp32(weight)
        assert torch.equal(first, plain) and in_fp32(whole).data_ptr() == first.data_ptr()
        assert torch.equal(in_fp32(view), plain[:, 2:5]) and in_fp32(view).stride() == (8, 1)
        assert in_fp32(view).data_ptr() == first.data_ptr() + 8
        assert torch.equal(plain @ whole, plain @ plain.t())
    assert in_fp32(weight).data_ptr() != first.data_ptr()


def test_a_weight_becomes_fp32_once_for_states_that_advance_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(stored_in(torch.bfloat16, write_tiny_text("llama", tmp_path)), mapped=True)
    batch = batch_for("llama", tmp_path)
    ops = ops_of(model, batch)
    states = [{op.op_name: "inc_int8"} for op in ops if "layers.0" in op.op_name]
    assert len(states) > 4
    made: list[torch.Tensor] = []
    to_fp32, copy = torch.Tensor.float, torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "float", lambda x: made.append(x) or to_fp32(x))  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, y: made.append(y) or copy(x, y))  # type: ignore[func-returns-value]
    counts = {}
    with Replay(model, ops, "lm_head") as replay:
        assert replay.together == TOGETHER
        replay.calibrate(batch)
        for together in (1, len(states)):
            replay.together = together
            replay.begin(batch)
            made.clear()
            for _ in replay.run_each(states):
                pass
            counts[together] = sum(x.dtype == torch.bfloat16 and x.ndim == 2 for x in made)
    # A state does not use the FP32 values of its own op.
    ops_after = sum("layers" in op.op_name or op.op_name == "lm_head" for op in ops)
    assert counts == {1: len(states) * (ops_after - 1), len(states): ops_after}


MEMORY = """
import sys
from pathlib import Path
import re
from auto_quantize_model.models.snapshot import count_parameters, load_model, zero_model
def resident():
    status = Path("/proc/self/status").read_text()
    return sum(map(int, re.findall("Rss(?:Anon|Shmem):\\s+(\\d+)", status))) * 1024
directory = Path(sys.argv[1])
def load():
    if sys.argv[2] == "load_model":
        return load_model(directory, mapped=True)
    model = zero_model(directory)
    for weight in model.parameters():  # to read zeros takes no memory either
        weight.detach().sum()
    return model
load()  # once, for what transformers imports
before = resident()
model = load()
print((resident() - before) / count_parameters(directory))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells anonymous memory apart")
@pytest.mark.parametrize("loader", ["load_model", "zero_model"])
def test_a_loaded_model_takes_far_less_than_four_bytes_a_weight(tmp_path: Path, loader: str) -> None:
    config = small_config("llama", 8192, hidden_size=1024, intermediate_size=2048, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), loader]
    ended = subprocess.run(code, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"-?\d.*", ended.stdout.strip()) and float(ended.stdout) < 0.5
