"""The gradients of the block-by-block backward are those of one backward through the whole model."""

import pytest
import torch
import transformers
from build import ACTIVATION, an_op
from quick_inc import few_ops_model, token_batches

from auto_quantize_model.files import InputError
from auto_quantize_model.models.snapshot import load_model
from auto_quantize_model.replay.backward import Backward, frozen
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.replay.model import Replay

SCHEMES = ("inc_int8", "W8A8", "FP8_DYNAMIC")
DIRECTIONS = 2


def direction(logits, index):
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(index)).to(logits.device)


def ops_of(model):
    kinds = {torch.nn.Linear: SCHEMES, torch.nn.Embedding: SCHEMES[:1], torch.nn.Conv3d: SCHEMES[:1]}
    return [
        an_op(
            name,
            type(module).__name__,
            shape=tuple(module.weight.shape),
            schemes=kinds[type(module)],
            activation=ACTIVATION | {"name": "MinMaxObserver"},
        )
        for name, module in model.named_modules()
        if type(module) in kinds
    ]


def whole(model, replay, ops, batch):
    """The same products by hooks and one graph of the whole model: {op_name: (schemes, directions)}."""
    errors, outputs = {}, {}

    def hook(name):
        def keep(module, args, output):
            with torch.no_grad():
                errors[name] = [replay.sites[name].in_scheme(scheme, args[0]) - output for scheme in able[name]]
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return output.clone()

        return keep

    able = {op.op_name: op.schemes for op in ops}
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in able]
    logits = model(**batch).logits
    found = {}
    for index in range(DIRECTIONS):
        gradients = torch.autograd.grad(logits, list(outputs.values()), direction(logits, index), retain_graph=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            found.setdefault(name, []).append([float((gradient * error).sum()) for error in errors[name]])
    for handle in handles:
        handle.remove()
    return {name: torch.tensor(rows).T for name, rows in found.items()}


def products_of(model, batch, head="lm_head"):
    ops = ops_of(model)
    with Replay(model, ops, head, schemes=schemes_of(dict.fromkeys(SCHEMES, {}), model)) as replay:
        replay.calibrate(batch)
        replay.begin(batch)
        expected = whole(model, replay, ops, batch)
        blocks = []
        backward = Backward(replay, {op.op_name: op.schemes for op in ops}, DIRECTIONS)
        found = backward.run(direction, lambda done, total: blocks.append((done, total)))
    assert blocks[-1][0] == blocks[-1][1] == len(blocks)
    return expected, found


def require_close(expected, found):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].sum((-2, -1)), values, rtol=1e-3, atol=1e-4 * float(values.abs().max()))


def test_products_are_those_of_a_backward_through_the_whole_model():
    expected, found = products_of(few_ops_model(), token_batches(1)[0])
    require_close(expected, found)
    assert all(values.abs().min() > 0 for values in expected.values())


def test_images_and_a_cache_of_keys_change_nothing(tiny_snapshot, batches):
    model = load_model(tiny_snapshot)
    assert model.config.text_config.use_cache
    expected, found = products_of(model, batches[0])
    require_close(expected, found)
    assert any("visual" in name for name in found) and model.config.text_config.use_cache


def test_samples_of_a_batch_are_kept_apart():
    first, second = token_batches(2)
    model = few_ops_model()
    together = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]])}
    _, found = products_of(model, together)
    tokens = first["input_ids"].shape[1]
    assert {values.shape for values in found.values()} == {(count, DIRECTIONS, 2, tokens) for count in (1, 3)}


def test_a_measured_op_inside_of_a_block_is_refused():
    model = few_ops_model()
    name = "model.blocks.1.down"
    with Replay(model, [an_op("model.project"), an_op("lm_head")], name) as replay:
        replay.begin(token_batches(1)[0])
        with pytest.raises(InputError, match=rf"^{name}, where errors .* set sensitivity.exact to all$"):
            Backward(replay, {}, 1).run(direction, lambda done, total: None)


def test_weights_that_train_still_do_afterwards():
    model = few_ops_model().requires_grad_()
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
FAMILIES = {
    "Gemma3Text": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": {**SMALL, "intermediate_size": 64, "eos_token_id": 0},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100},
    "OPT": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Phi3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0},
    "Qwen3Moe": {
        **SMALL,
        **{"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
        **{"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_of_its_whole_model(family):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (head,) = (name for name, _ in model.named_modules() if name in ("lm_head", "embed_out"))
    batch = {"input_ids": torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(1))}
    expected, found = products_of(model, batch, head)
    require_close(expected, found)
    assert head in found and len(found) > 7


@pytest.mark.gpu
def test_the_gradients_of_a_gpu_are_those_of_the_cpu():
    batch = token_batches(1)[0]
    expected, _ = products_of(few_ops_model(), batch)
    there = {name: tensor.cuda() for name, tensor in batch.items()}
    on_gpu, found = products_of(few_ops_model().cuda(), there)
    require_close(on_gpu, {name: values.cpu() for name, values in found.items()})
    require_close(expected, {name: values.cpu() for name, values in found.items()})
