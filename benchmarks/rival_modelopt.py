"""The choices of ModelOpt's auto_quantize, for `benchmarks/rivals.py`, which runs this file in ModelOpt's environment.

    python benchmarks/rival_modelopt.py TASK.json CHOICES.json

In: {snapshot, samples, calibrate, counts, bits}. `samples` are lists of token ids, and the first `calibrate` of them
set the ranges of inputs. `counts` says after how many scored samples to choose. `bits` holds the budgets. Out: {count:
{choices: {budget: {module: scheme}}, seconds: of the CPU}}. A module in BF16 has no entry.

ModelOpt asserts a CUDA tensor for NVFP4. `nvfp4` below does the arithmetic of its kernel on a CPU instead.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

# Per channel and per token, as FP8_DYNAMIC.
FORMATS = [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG]
SCHEMES = {(2, 1): "NVFP4", (4, 3): "FP8_DYNAMIC"}  # by ModelOpt's num_bits
LARGEST, LARGEST_SCALE = 6.0, 448.0  # of E2M1 and E4M3
kept: dict[Any, torch.Tensor] = {}  # quantized weights, which ModelOpt would make again in each forward


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensor_quant.dynamic_block_quantize_op = once(nvfp4)
    tensor_quant.quantize_op = once(tensor_quant.quantize_op)
    model = transformers.AutoModelForCausalLM.from_pretrained(task["snapshot"], dtype=torch.float32).eval()
    samples = Samples([torch.tensor([ids]) for ids in task["samples"]], model, task["counts"])
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": min(task["bits"]), "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=FORMATS,
        data_loader=samples,
        forward_step=lambda model, ids: model(input_ids=ids, labels=ids),
        loss_func=lambda output, ids: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=task["calibrate"],
        num_score_steps=len(samples.batches) + 1,  # so that ModelOpt asks for one more, after the last was scored
    )
    result = {}
    for count, (seconds, scores) in samples.found.items():
        configs = {
            bits: mtq.get_auto_quantize_config({**state, "candidate_stats": scores}, {"effective_bits": bits})
            for bits in task["bits"]
        }
        result[count] = {"choices": {bits: choice(config) for bits, config in configs.items()}, "seconds": seconds}
    Path(sys.argv[2]).write_text(json.dumps(result))
    return 0


class Samples:
    """The samples, which ModelOpt goes through once for each format's calibration and then to score.

    Attributes:
        found: {count: the CPU seconds until so many samples were scored, and ModelOpt's scores then}.
    """

    def __init__(self, batches: list[torch.Tensor], model: torch.nn.Module, counts: list[int]) -> None:
        self.batches, self.model, self.counts = batches, model, counts
        self.found: dict[int, tuple[float, Any]] = {}
        self.started, self.passes = time.process_time(), 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.passes += 1
        scoring = self.passes > len(FORMATS)
        for done, batch in enumerate(self.batches):
            yield batch
            if scoring and done + 1 in self.counts:
                searcher = SimpleNamespace(model=self.model, candidate_stats=defaultdict(dict))
                AutoQuantizeGradientSearcher.initialize_candidate_stats(searcher)
                self.found[done + 1] = time.process_time() - self.started, dict(searcher.candidate_stats)


def choice(config: dict[str, Any]) -> dict[str, str]:
    """{module: scheme} of a quant_cfg, whose later entries win."""
    found: dict[str, str] = {}
    for entry in config["quant_cfg"]:
        module, _, quantizer = entry["quantizer_name"].rpartition(".")
        if quantizer == "weight_quantizer" and entry.get("enable", True):
            found[module] = SCHEMES[tuple(entry["cfg"]["num_bits"])]
    return found


def once(quantize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A quantizer that keeps what it made of a weight. This saves ModelOpt seconds, and changes no value."""

    def made(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            return quantize(x, *args, **kwargs)
        if (quantize, x.data_ptr()) not in kept:
            kept[quantize, x.data_ptr()] = quantize(x, *args, **kwargs)
        return kept[quantize, x.data_ptr()]

    return made


def nvfp4(
    x: torch.Tensor,
    block_size: int,
    amax: torch.Tensor,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """E2M1 values in blocks with an E4M3 scale each, and one float32 scale of the tensor, rounded half to even."""
    assert (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) == (4, 2, 8, 4)  # noqa: S101
    blocks = x.detach().float().unflatten(-1, (-1, block_size))
    common = amax.float().max() / (LARGEST * LARGEST_SCALE)
    scale = blocks.abs().amax(-1, keepdim=True) / (LARGEST * common)
    scale = scale.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float() * common
    values = blocks / torch.where(scale > 0, scale, 1.0)
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    values = ((values / step).round_() * step).clamp_(-LARGEST, LARGEST)
    return (values * scale).flatten(-2).to(x.dtype)


if __name__ == "__main__":
    raise SystemExit(main())
