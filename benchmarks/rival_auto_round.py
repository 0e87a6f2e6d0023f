"""The choices of AutoRound's AutoScheme, for `benchmarks/rivals.py`, which runs this file in AutoRound's environment.

    python benchmarks/rival_auto_round.py TASK.json CHOICES.json

In: {snapshot, texts: of one passage each, counts: how many of them to score, bits: the budgets}. Out: {count: {choices:
{budget: {module: scheme}}, seconds: of the CPU}}. A module in BF16 has no entry.

AutoScheme has no FP8 with scales per token, so FP8_STATIC stands for FP8_DYNAMIC.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from auto_round import AutoRound, AutoScheme

OPTIONS = ["NVFP4", "FP8_STATIC", "BF16"]
SCHEMES = {4: "NVFP4", 8: "FP8_DYNAMIC"}  # by the bits of a weight
# As a serving engine fuses them.
SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {count: scored(task, count) for count in task["counts"]}
    Path(sys.argv[2]).write_text(json.dumps(result))
    return 0


def scored(task: dict[str, Any], count: int) -> dict[str, Any]:
    """The choices by so many samples, and their seconds."""
    started, choices = time.process_time(), {}
    with tempfile.TemporaryDirectory() as folder:
        # The scores of the first budget serve the others, but no scores of an earlier run.
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder
        texts = Path(folder) / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in task["texts"]))
        for bits in task["bits"]:
            model = transformers.AutoModelForCausalLM.from_pretrained(task["snapshot"], dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(task["snapshot"])
            scheme = AutoScheme(avg_bits=bits, options=OPTIONS, shared_layers=SHARED, nsamples=count)
            rounding = AutoRound(
                model, tokenizer=tokenizer, scheme=scheme, dataset=str(texts), iters=0, device_map="cpu", amp=False
            )
            rounding.post_init()
            found = rounding.layer_config
            choices[bits] = {name: SCHEMES[of["bits"]] for name, of in found.items() if of["bits"] in SCHEMES}
    return {"choices": choices, "seconds": time.process_time() - started}


if __name__ == "__main__":
    raise SystemExit(main())
