"""What a model holds in another form becomes plain modules that share its weights and keep every bit of its output."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.nn import quantized as nnq
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from auto_quantize_model.made.tiny_text import small_config
from auto_quantize_model.models.experts import (
    TRIAL_ROWS,
    BatchedExperts,
    Experts,
    FlatExperts,
    RoutedExperts,
    SplitExperts,
    StackedLinear,
    trial_of_experts,
)
from auto_quantize_model.models.prepare import PLAIN, is_changed_in_place, prepare, with_number_of_padding

VOCABULARY = 97
OTHERS = {"longcat_flash": {"head_dim": 8, "qk_head_dim": 16}}
# A model type of each form, with the class of its experts, and the modules that stay as they are.
FORMS: dict[str, tuple[type[Experts] | None, dict[str, str]]] = {
    "mixtral": (RoutedExperts, {}),
    "gpt_oss": (RoutedExperts, {}),
    "nemotron_h": (RoutedExperts, {}),
    "longcat_flash": (RoutedExperts, {}),
    "llama4_text": (BatchedExperts, {f"model.layers.{n}.feed_forward.router": "Llama4Router" for n in (0, 1)}),
    "jetmoe": (SplitExperts, {}),
    "dbrx": (FlatExperts, {}),
    "gpt2": (None, {}),
    "falcon": (None, {}),
    "gemma3_text": (None, {}),
    "opt": (None, {}),
    "bart": (None, {}),
    "deepseek_v4": (RoutedExperts, {f"model.layers.{n}.self_attn.o_a_proj": "DeepseekV4GroupedLinear" for n in (0, 1)}),
    "whisper": (None, {"model.decoder.embed_positions": "WhisperPositionalEmbedding"}),
}
seeds = st.integers(0, 2**32 - 1)


def built(model_type: str) -> Any:
    """A tiny model in which no bias is zero and no norm is one."""
    torch.manual_seed(0)
    config = small_config(model_type, VOCABULARY, **OTHERS.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def logits(model: Any) -> list[torch.Tensor]:
    """Of a sample of 12 tokens, and of two samples of 7."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in ((1, 12), (2, 7))]
    with torch.no_grad():
        return [model(input_ids=ids).logits for ids in inputs]


def memory(model: Any) -> set[int]:
    """Where the weights lie."""
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def other_matrices(model: Any) -> set[str]:
    """The modules whose matrix a forward reads otherwise than a plain module does; of a convolution it has no rows."""
    found = set()
    for name, module in model.named_modules():
        plain = type(module) in PLAIN or "plain" in module._modules
        own = module.parameters(recurse=False)
        if not plain and any(p.ndim == 3 for p in own) and not isinstance(module, torch.nn.Conv1d):
            found.add(name)
        if not plain and isinstance(module, PLAIN):
            found.add(name)
        if type(module).__name__ == "Conv1D":
            found.add(name)
    return found


def structure(model: Any) -> dict[str, tuple[Any, ...]]:
    return {
        name: (id(module), type(module), *(id(parameter) for parameter in module.parameters(recurse=False)))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("model_type", FORMS)
def test_a_prepared_model_has_the_bits_and_the_memory_of_the_original(model_type: str) -> None:
    form, left = FORMS[model_type]
    model = built(model_type)
    expected, before = logits(model), memory(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    uses = "uses its weight otherwise than a plain module does"
    assert prepare(model) == {name: f"{kind} {uses}" for name, kind in left.items()}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits(model), expected, strict=True))
    assert memory(model) == before
    assert other_matrices(model) == {*left}
    changed = {name for name, module in model.named_modules() if classes.get(name) is not type(module)}
    assert bool(changed) == (model_type != "whisper") and not changed & {*left}
    assert all(type(model.get_submodule(name)) is classes[name] for name in left)
    found = {type(module).__mro__[1] for module in model.modules() if isinstance(module, Experts)}
    assert found == ({form} if form else set())


@pytest.mark.parametrize("model_type", FORMS)
def test_a_second_preparation_changes_nothing_more(model_type: str) -> None:
    model = built(model_type)
    left = prepare(model)
    before, expected = structure(model), logits(model)
    assert prepare(model) == left
    assert structure(model) == before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits(model), expected, strict=True))


def test_each_expert_has_a_linear_for_each_of_its_matrices() -> None:
    model = built("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    stacked, bias, down = experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj
    prepare(model)
    assert experts.gate_up_proj_bias is bias
    for index in range(4):
        linear = experts.get_submodule(f"gate_up_proj.{index}")
        assert (
            type(linear) is torch.nn.Linear and (linear.out_features, linear.in_features) == stacked[index].shape[::-1]
        )
        assert torch.equal(linear.weight, stacked[index].t()) and linear.bias is None
        assert linear.weight.data_ptr() == stacked[index].data_ptr()
        assert torch.equal(experts.down_proj[index].weight, down[index].t())


@given(seed=seeds, experts=st.integers(2, 6), tokens=st.integers(1, 6))
def test_experts_with_biases_have_the_bits_of_transformers_where_one_has_one_row(
    seed: int, experts: int, tokens: int
) -> None:
    """A Linear with a bias has other last bits for one row than a product with a sum after it."""
    torch.manual_seed(seed)
    config = GptOssConfig(hidden_size=64, intermediate_size=96, num_local_experts=experts)
    config._experts_implementation = "eager"
    module: Any = GptOssExperts(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)
    module.requires_grad_(False)
    rows, weights = torch.randn(tokens, 64), torch.rand(tokens, 2)
    index = torch.rand(tokens, experts).topk(2).indices
    expected = module(rows, index, weights)
    assert prepare(module) == {} and isinstance(module, RoutedExperts)
    assert torch.equal(module(rows, index, weights), expected)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "longcat_flash", "llama4_text", "jetmoe"])
def test_the_same_matrix_of_all_experts_can_be_one_op(model_type: str) -> None:
    model = built(model_type)
    expected, before = logits(model), memory(model)
    left = prepare(model, "block")
    assert left.keys() == FORMS[model_type][1].keys()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits(model), expected, strict=True))
    assert memory(model) == before
    blocks = [module for module in model.modules() if isinstance(module, StackedLinear)]
    assert blocks and all(module.weight.ndim == 3 for module in blocks)
    assert prepare(model, "block") == left
    assert [module for module in model.modules() if isinstance(module, StackedLinear)] == blocks


def test_in_the_trial_of_experts_one_of_them_has_one_row() -> None:
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    torch.manual_seed(0)
    index = trial_of_experts(MixtralExperts(config))[1]
    assert index.flatten().bincount().tolist()[-1] == 1 and index.flatten().bincount().sum() == 2 * TRIAL_ROWS


def test_the_conv1d_of_gpt2_is_a_linear_of_the_transposed_view() -> None:
    model = built("gpt2")
    before = model.transformer.h[0].attn.c_attn.weight
    prepare(model)
    linear = model.transformer.h[0].attn.c_attn
    assert type(linear) is torch.nn.Linear and (linear.in_features, linear.out_features) == tuple(before.shape)
    assert torch.equal(linear.weight, before.t()) and linear.weight.data_ptr() == before.data_ptr()


def test_an_embedding_that_scales_or_shifts_holds_a_plain_one_with_its_weight() -> None:
    for model_type, name in (("gemma3_text", "model.embed_tokens"), ("opt", "model.decoder.embed_positions")):
        model = built(model_type)
        kind = type(model.get_submodule(name))
        prepare(model)
        embedding: Any = model.get_submodule(name)
        assert isinstance(embedding, kind) and type(embedding.plain) is torch.nn.Embedding
        assert embedding.plain.weight is embedding.weight
        seen: list[torch.Tensor] = []
        embedding.plain.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        logits(model)
        assert len(seen) == 2


def test_a_tied_head_keeps_the_weight_of_the_embedding() -> None:
    model = built("gemma3_text")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.plain.weight


def test_no_padding_is_said_by_numbers_and_torchs_quantized_convolution_takes_them() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval().requires_grad_(False)
    (convolution,) = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    assert convolution.padding == "valid"
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state
        weight = convolution.weight
        assert prepare(model) == {}
        assert convolution.padding == (0, 0) and type(convolution) is torch.nn.Conv2d and convolution.weight is weight
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, expected)
    nnq.Conv2d.from_float(with_observers(convolution))


def with_observers(module: Any) -> Any:
    observer = torch.ao.quantization.HistogramObserver()
    observer(torch.randn(9))
    module.activation_post_process, module.qconfig = observer, torch.ao.quantization.default_qconfig
    return module


def test_a_convolution_with_other_padding_is_no_subject() -> None:
    same = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding="same"), torch.nn.Conv2d(3, 3, 3, padding=1))
    assert prepare(same) == {}
    assert [module.padding for module in same] == ["same", (1, 1)]


class Reader(torch.nn.Linear):
    """Reads its weight itself, so an op that replaces it would not be seen."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t()


class Scaling(torch.nn.Linear):
    """Scales what a plain Linear returns."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Failing(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it takes another input")


@pytest.mark.parametrize("kind", [Reader, Scaling, Failing])
def test_a_subclass_of_linear_is_plain_inside_or_named(kind: type[torch.nn.Linear]) -> None:
    """A forward without bias that reads its weight has the bits of a Linear, and may become one."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"own": kind(8, 4, bias=kind is not Reader), "sub": torch.nn.Linear(4, 4)})
    own = model["own"]
    fields, x = dict(vars(own)), torch.randn(5, 8)
    expected = None if kind is Failing else own(x)
    left = prepare(model)
    if kind is Failing:
        assert left == {"own": "Failing uses its weight otherwise than a plain module does"}
        assert type(own) is Failing and vars(own) == fields
        return
    assert left == {} and torch.equal(model["own"](x), expected)
    assert (type(own) is torch.nn.Linear) == (kind is Reader)
    assert ("plain" in own._modules) == (kind is Scaling)


def test_a_module_whose_bits_would_change_is_as_it_was() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 2, stride=2, padding="valid")
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}

    def spoil(own: Any) -> None:
        with_number_of_padding(own)
        own.stride = (1, 1)
        own.weight = torch.nn.Parameter(own.weight * 2)

    with torch.no_grad():
        assert not is_changed_in_place(module, spoil)
    assert vars(module) == fields


@given(seed=seeds, experts=st.integers(1, 6), tokens=st.integers(1, 20), chosen=st.integers(1, 4))
def test_routed_experts_have_the_bits_of_transformers_for_any_choice(
    seed: int, experts: int, tokens: int, chosen: int
) -> None:
    torch.manual_seed(seed)
    chosen = min(chosen, experts)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=experts)
    config._experts_implementation = "eager"
    module: Any = MixtralExperts(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)
    module.requires_grad_(False)
    rows, weights = torch.randn(tokens, 16), torch.rand(tokens, chosen)
    index = torch.rand(tokens, experts).topk(chosen).indices
    expected = module(rows, index, weights)
    assert prepare(module) == {} and isinstance(module, RoutedExperts)
    assert torch.equal(module(rows, index, weights), expected)
    assert torch.equal(module.chosen, index)


@given(seed=seeds, rows=st.integers(2, 200), columns=st.integers(1, 40), scale=st.floats(0.01, 100))
def test_a_scaled_embedding_keeps_its_bits_for_any_scale(seed: int, rows: int, columns: int, scale: float) -> None:
    torch.manual_seed(seed)
    module: Any = Gemma3TextScaledWordEmbedding(rows, columns, 0, embed_scale=scale).requires_grad_(False)
    ids = torch.randint(0, rows, (2, 5))
    expected = module(ids)
    assert prepare(module) == {}
    assert type(module if scale == 1 else module.plain) is torch.nn.Embedding  # a scale of 1 changes nothing
    assert torch.equal(module(ids), expected)
