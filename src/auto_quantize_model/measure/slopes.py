"""How the divergence of a mixed model changes when one unit takes another scheme, for all units at once.

In: a state of the model, a batch, and the schemes that each unit can have. Out: the divergence of the state, and for
each unit and scheme the change of the divergence to first order.

In a mixed model the errors of the units meet: some add up, others cancel. A sum over units that were quantized alone
knows nothing of this. The gradient of the divergence, taken where all units have their schemes, does. Its product with
the change of an op's output is the change of the divergence. A quantized op hands a gradient on as an unquantized one.
This is the straight-through estimator of Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through
Stochastic Neurons for Conditional Computation", 2013.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auto_quantize_model.files import digest_of
from auto_quantize_model.measure.capture import digest_of_batch, state_key
from auto_quantize_model.measure.heldout import ADVICE, HeldOut, in_words
from auto_quantize_model.measure.metrics import Reference, require_finite
from auto_quantize_model.replay.backward import Backward
from auto_quantize_model.replay.model import Batch, Replay
from auto_quantize_model.schemes.scheme import UNQUANTIZED, Assignment

Wanted = Mapping[str, tuple[Sequence[str], Sequence[str]]]  # {unit: its ops, and the schemes to change to}
Slopes = dict[str, dict[str, float]]  # {unit: {scheme: change of the divergence, in nats per position}}


def slopes(replay: Replay, batch: Batch, state: Assignment, wanted: Wanted) -> tuple[float, Slopes]:
    """The divergence of a state on a batch, and its change to first order for each unit and scheme.

    Args:
        replay: with scales set.
        state: of the whole model.
        wanted: schemes may hold `unquantized`. An op that does not run on the batch changes nothing.

    Returns:
        The mean over positions, in nats, and {unit: {scheme: nats per position}}.

    Raises:
        InputError: the measured op runs inside of a block.
    """
    reference = Reference(replay.begin(batch).clone(), batch.get("mm_token_type_ids"))
    positions = reference.output.shape[:-1].numel()
    divergence = 0.0

    def direction(output: torch.Tensor, index: int) -> torch.Tensor:
        nonlocal divergence
        divergence = float(reference.compare(output)["kl_divergence"])
        return (output.softmax(-1) - reference.output.softmax(-1)) / positions

    asked: dict[str, list[str]] = {}
    for ops, schemes in wanted.values():
        for op in ops:
            if op in replay.order:
                able = [name for name in schemes if name == UNQUANTIZED or replay.sites[op].ready(name)]
                asked[op] = [*dict.fromkeys([*asked.get(op, []), *able])]
    products = Backward(replay, asked, 1, state).run(direction, lambda done, total: None)
    found: Slopes = {unit: {} for unit in wanted}
    for unit, (ops, schemes) in wanted.items():
        for scheme in schemes:
            parts = [products[op][asked[op].index(scheme)] for op in ops if op in products and scheme in asked[op]]
            found[unit][scheme] = float(sum(part.sum() for part in parts))
    return divergence, found


def kept_slopes(heldout: HeldOut, batch: Batch, index: int, state: Assignment, wanted: Wanted) -> tuple[float, Slopes]:
    """As `slopes`, from the score store where it has them.

    Raises:
        InputError: a number is not finite; the message names the batch by `index`.
    """
    of = heldout.base | {"batch": digest_of_batch(batch), "answers": []}
    key = digest_of(["slopes", state_key(state, heldout.plan.schemes, heldout.scales), wanted])
    with heldout.store.shelf(of) as shelf:
        record: Any = shelf.get(key)
        if record is None:
            divergence, found = slopes(heldout.replay, batch, state, wanted)
            numbers = {"kl_divergence": divergence}
            numbers |= {unit: value for unit, of_unit in found.items() for value in of_unit.values()}
            require_finite(numbers, f"calibration batch {index}", in_words(state), ADVICE)
            record = {"divergence": divergence, "slopes": found}
            shelf.add(key, record)
    return record["divergence"], record["slopes"]
