"""The calibrations of a run: each scored batch alone, and all batches together.

In: a model, its plan and the calibration batches. Out: the scales of each calibration, by its name.
"""

from collections.abc import Callable, Sequence
from itertools import count

import torch

from auto_quantize_model.records import Plan, Scales
from auto_quantize_model.replay.model import Batch, Replay, refusals
from auto_quantize_model.replay.scales import ALL_BATCHES, name_of_batch


def calibrate(
    model: torch.nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    whole_set: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scales]:
    """Calibrate every op that the replay covers.

    Args:
        model: FP32, eval mode, on its device; left as it was.
        plan: as `inc.plan.build_plan` returns it; its first `confidence_batches` batches are scored.
        batches: all calibration batches.
        whole_set: whether to calibrate on all of them together as well.
        on_progress: called after each forward with the number done and the total.

    Raises:
        InputError: an op's input or output is not finite.
    """
    refused = refusals(model, plan.ops)
    ops = [op for op in plan.ops if op.op_name not in refused]
    calibrations = {name_of_batch(index): batches[index : index + 1] for index in range(plan.confidence_batches)}
    if whole_set:
        calibrations[ALL_BATCHES] = batches
    total = sum(len(together) for together in calibrations.values())
    done = count(1)
    with Replay(model, ops, plan.measured_op) as replay:
        return {
            name: replay.calibrate(*together, on_batch=lambda: on_progress(next(done), total))
            for name, together in calibrations.items()
        }
