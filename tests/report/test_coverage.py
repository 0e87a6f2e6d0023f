"""What the planned ops hold of a model's weights is counted once each, and what they leave out is named first."""

from typing import Any

import pytest
import torch
import transformers
from build import COVERAGE
from test_document import NAMES, parts
from tiny_models import batch_of, loaded, noise

from auto_quantize_model.config import PlanSpec
from auto_quantize_model.escape import code
from auto_quantize_model.inc.plan import build_plan
from auto_quantize_model.made.digits import build_config, build_tokenizer
from auto_quantize_model.models.coverage import cover
from auto_quantize_model.models.prepare import CONVOLUTIONS, prepare
from auto_quantize_model.models.units import tower_of
from auto_quantize_model.report import coverage
from auto_quantize_model.report.document import build_report, render

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpt2() -> Any:
    return built(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=16))


def falcon() -> Any:
    return built(transformers.FalconConfig(**SMALL, bos_token_id=0, eos_token_id=0))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, intermediate_size=64, num_key_value_heads=4, num_local_experts=4)
    return built(config)


def digits() -> Any:
    """The shape of the embedded default."""
    return transformers.Qwen2_5_VLForConditionalGeneration(build_config(build_tokenizer(), depth=4, hidden=64))


def planned(model: torch.nn.Module) -> list[str]:
    """The modules of the very classes that INC plans."""
    classes = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv3d)
    return [name for name, module in model.named_modules() if type(module) in classes]


def group(found: dict[str, Any], pattern: str) -> dict[str, Any]:
    (one,) = (entry for entry in found["left_out"] if entry["pattern"] == pattern)
    return one


def test_of_gpt2_the_embeddings_alone_are_planned_and_tied_weights_count_once() -> None:
    found = cover(gpt2(), planned(gpt2()), [])
    embeddings = 100 * 32 + 16 * 32
    conv1d = 2 * ((32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32))
    norms = 5 * 2 * 32
    assert (found["weights_planned"], found["weights_kept"]) == (embeddings, 0)
    assert found["weights_total"] == embeddings + conv1d + norms
    assert found["share"] == embeddings / (embeddings + conv1d + norms)
    fused = {"class": "Conv1D", "count": 2, "weights": 2 * (32 * 96 + 96), "bytes": 8 * (32 * 96 + 96), "reason": ""}
    assert group(found, "transformer.h.*.attn.c_attn") == {"pattern": "transformer.h.*.attn.c_attn"} | fused
    sizes = [entry["bytes"] for entry in found["left_out"]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == 4 * (conv1d + norms)


def test_of_falcon_its_own_linear_class_is_left_out() -> None:
    found = cover(falcon(), planned(falcon()), [])
    assert found["weights_planned"] == 100 * 32
    left = group(found, "transformer.h.*.mlp.dense_h_to_4h")
    assert left["class"] == "FalconLinear" and left["count"] == 2 and left["weights"] == 2 * 32 * 128


def test_of_mixtral_experts_in_three_dimensions_are_left_out() -> None:
    found = cover(mixtral(), planned(mixtral()), [])
    expert = {"class": "MixtralExperts", "count": 2, "weights": 2 * 4 * 128 * 32, "bytes": 8 * 4 * 128 * 32}
    expert |= {"reason": ""}
    assert found["left_out"][0] == {"pattern": "model.layers.*.mlp.experts.gate_up_proj"} | expert
    attention = 2 * 4 * 32 * 32
    assert found["weights_planned"] == 2 * 100 * 32 + attention


def test_what_the_config_keeps_is_not_left_out() -> None:
    model = gpt2()
    found = cover(model, ["transformer.wte"], ["transformer.wpe"])
    assert (found["weights_planned"], found["weights_kept"]) == (100 * 32, 16 * 32)
    assert not [entry for entry in found["left_out"] if entry["pattern"] == "transformer.wpe"]
    everything = cover(model, [], [name for name, _ in model.named_modules()])
    assert everything["share"] == 0 and not coverage.is_partial(everything)


def test_of_the_digit_reader_norms_are_left_out_and_biases_are_not_quantized() -> None:
    model = digits()
    found = cover(model, planned(model), [])
    assert coverage.headline(len(planned(model)), found) == "53 ops hold 99.1 % of the weights"
    quantized = [model.get_submodule(name).weight.numel() for name in planned(model)]
    assert found["weights_planned"] == sum(quantized)
    assert {entry["class"] for entry in found["left_out"]} == {"Qwen2_5_VLRMSNorm"}
    assert not coverage.is_partial(found) and coverage.warnings(found) == []


@pytest.mark.parametrize(
    ("planned_weights", "kept", "partial", "share"),
    [(900, 0, False, "90.0 %"), (899, 0, True, "89.9 %"), (499, 401, False, "49.9 %"), (1000, 0, False, "100.0 %")],
)
def test_ninety_percent_are_enough_and_less_than_all_is_never_said_to_be_all(
    planned_weights: int, kept: int, partial: bool, share: str
) -> None:
    found = COVERAGE | {"weights_total": 1000, "weights_planned": planned_weights, "weights_kept": kept}
    assert coverage.is_partial(found) is partial
    assert f"53 ops hold {share} of the weights" in coverage.headline(53, found)
    assert coverage.share_of(99_999, found | {"weights_total": 100_000}) == "99.9 %"


@pytest.mark.slow
@pytest.mark.parametrize(("build", "share"), [(gpt2, 0.12), (falcon, 0.11), (mixtral, 0.22)])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_the_plan_says_what_it_holds(build: Any, share: float, is_prepared: bool) -> None:
    model = build().requires_grad_(False)
    if is_prepared:
        assert prepare(model) == {}
        share = 0.98
    batch = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    plan = build_plan(model, [batch], PlanSpec(confidence_batches=1, maps=("isolated",)))
    reasons = {module.op_name: module.reason for module in plan.excluded}
    assert plan.coverage == cover(model, planned(model), [], reasons, batch)
    assert all(left["reason"] for left in plan.coverage["left_out"])
    (tower,) = plan.coverage["towers"].values()
    assert 0.9 < tower["multiply_adds_planned"] / tower["multiply_adds_total"] < 1 or not is_prepared
    assert plan.coverage["share"] == pytest.approx(share, abs=0.02)


class Sees(torch.nn.Module):
    """A vision tower of a convolution and a Linear, what joins it to the text, an attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Flatten(2))
        self.multi_modal_projector = torch.nn.Linear(4, 16)
        self.text = torch.nn.ModuleDict({"q": torch.nn.Linear(16, 16), "norm": torch.nn.LayerNorm(16)})
        self.head = torch.nn.Linear(16, 50)
        self.free = torch.nn.Parameter(torch.ones(5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.text["norm"](self.multi_modal_projector(self.vision(pixels)))
        query = self.text["q"](seen).unflatten(-1, (2, 8)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        out: torch.Tensor = self.head(attended.transpose(1, 2).flatten(2))
        return out


def test_weights_and_multiply_adds_of_each_tower_are_those_counted_by_hand() -> None:
    model, pixels = Sees().requires_grad_(False), torch.ones(1, 3, 8, 8)  # 2 x 2 patches; 8 channels are the tokens
    found = cover(model, ["vision.0", "text.q", "head"], [], {}, {"pixels": pixels})
    assert found["towers"] == {
        "vision": {
            "weights_total": (8 * 48 + 8) + (16 * 4 + 16),
            "weights_planned": 8 * 48,
            "multiply_adds_total": 4 * 8 * 48 + 8 * 4 * 16,
            "multiply_adds_planned": 4 * 8 * 48,
        },
        "language": {
            "weights_total": (16 * 16 + 16) + 2 * 16 + (50 * 16 + 50) + 5,
            "weights_planned": 16 * 16 + 50 * 16,
            # Of the attention: each of two heads multiplies 8 x 8 queries and keys, and the result with 8 x 8 values.
            "multiply_adds_total": 8 * 16 * 16 + 2 * 2 * 8 * 8 * 8 + 8 * 16 * 50,
            "multiply_adds_planned": 8 * 16 * 16 + 8 * 16 * 50,
        },
    }
    assert sum(tower["weights_total"] for tower in found["towers"].values()) == found["weights_total"]


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_the_towers_of_a_model_of_images_hold_all_its_weights_and_matrices(name: str) -> None:
    """A hook on each Linear and convolution counts the multiply-adds once more, without torch's counter."""
    model, batch = loaded(name)[0], batch_of(name, noise(60, 40))
    names = [one for one, module in model.named_modules() if type(module) in (torch.nn.Linear, *CONVOLUTIONS)]
    by_hand = dict.fromkeys(names, 0)

    def count(one: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            rows = output.numel() // len(module.weight)
            by_hand[one] += rows * module.weight.numel()

        return hook

    handles = [model.get_submodule(one).register_forward_hook(count(one)) for one in names]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    found = cover(model, names, [], {}, batch)
    assert {*found["towers"]} == {"vision", "language"}
    for tower, share in found["towers"].items():
        assert share["multiply_adds_planned"] == sum(of for one, of in by_hand.items() if tower_of(one) == tower) > 0
        assert share["multiply_adds_planned"] < share["multiply_adds_total"]
    totals = [share["weights_total"] for share in found["towers"].values()]
    assert sum(totals) == found["weights_total"] == sum(parameter.numel() for parameter in model.parameters())
    without = cover(model, names, [], {}, batch_of(name))["towers"]
    assert without["vision"]["multiply_adds_total"] == 0 < without["language"]["multiply_adds_total"]


def test_the_experts_that_a_router_chose_alone_cost_multiply_adds() -> None:
    model = mixtral().requires_grad_(False)
    assert prepare(model) == {}
    experts = [name for name in planned(model) if ".experts." in name]
    found = cover(model, experts, [], {}, {"input_ids": torch.arange(8)[None]})["towers"]["language"]
    of_one = 128 * 32 + 32 * 64  # 8 tokens, 2 experts each, 2 blocks
    assert found["multiply_adds_planned"] == 2 * 8 * 2 * of_one and found["weights_planned"] == 2 * 4 * of_one


@pytest.fixture
def partial() -> dict[str, Any]:
    return cover(mixtral(), planned(mixtral()), [])


def test_the_first_warning_and_the_head_of_the_report_name_what_is_left_out(partial: dict[str, Any]) -> None:
    report = build_report(*parts(plan={"coverage": partial}, stand_in="drawn"))
    share = coverage.share_of(partial["weights_planned"], partial)
    assert report["coverage"] == partial
    assert report["warnings"][0].startswith(f"The planned ops hold only {share} of the model's weights")
    assert "model.layers.*.mlp.experts.gate_up_proj (MixtralExperts, 2 x, 131 kB)" in report["warnings"][0]
    markdown, _ = render(report)
    warnings = markdown.index("> **Warning:** The planned ops hold only")
    assert warnings < markdown.index(f"**{len(NAMES)} ops hold {share} of the weights.**") < markdown.index("mse_v2:")
    assert (
        f"| {code('model.layers.*.mlp.experts.gate_up_proj')} | MixtralExperts | 2 | 32768 | 131 kB | – |" in markdown
    )


def test_a_remark_for_exports_names_all_that_is_left_alone(partial: dict[str, Any]) -> None:
    (remark,) = coverage.remark(partial)
    assert remark.startswith("Left alone, because the plan has no op") and "smaller group" not in remark
    assert "model.layers.*.mlp.experts.down_proj (MixtralExperts" in remark
    assert coverage.remark(COVERAGE) == []


@pytest.mark.parametrize(("groups", "said"), [(7, "and 1 smaller group"), (8, "and 2 smaller groups")])
def test_groups_beyond_those_named_are_counted(groups: int, said: str) -> None:
    one = {"pattern": "a", "class": "Linear", "count": 1, "weights": 1, "bytes": 4}
    assert coverage.left_out({"left_out": [one] * groups}).endswith(said)


@pytest.mark.parametrize(
    ("value", "said"), [(82, "82 bytes"), (999_999, "1 MB"), (131_072, "131 kB"), (3_094_000_000, "3.09 GB")]
)
def test_bytes_have_a_unit_that_leaves_a_digit_before_the_point(value: int, said: str) -> None:
    assert coverage.in_bytes(value) == said
