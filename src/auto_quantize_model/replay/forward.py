"""One forward of a model under replay, which can wait before a block while other forwards go on.

In: a state, and a function that runs the model. Out: what the forward gives at the measured op. A greenlet holds a
forward that waits: all forwards run in one thread, one at a time, so torch's settings are those of this thread.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from greenlet import greenlet

from auto_quantize_model.models.mapped import Mapped


class Forward:
    """One forward.

    Attributes:
        state: of the ops: the items of an assignment.
        valid: how many of the kept outputs of blocks are valid for the state.
        visits: to how many blocks the forward has come.
        measured: the output at the measured op, after the end.
        remembered: what modules outside of the replay's sites remember of this forward while others run.
    """

    def __init__(self, state: frozenset[tuple[str, str]], valid: int) -> None:
        self.state, self.valid = state, valid
        self.visits = 0
        self.measured = torch.empty(0)
        self.remembered: Any = None
        self.running: greenlet | None = None

    def go_on(self, call: Callable[[], Any]) -> None:
        """Go on to the next call of `wait`, or to the end; the first time, start `call`."""
        if self.running is None:
            self.running = greenlet(call)
        self.running.switch()

    @property
    def waits(self) -> bool:
        """Whether the forward waits before blocks, because `go_on` started it."""
        return self.running is not None

    def wait(self) -> None:
        """Let the others go on, if the forward waits before blocks."""
        if self.running is not None:
            self.running.parent.switch()

    @property
    def ended(self) -> bool:
        """Whether the forward has ended."""
        return self.running is None or self.running.dead


def bytes_held_by(what: Any) -> int:
    """The bytes of all tensors in an object, such as a cache of keys and values, without weights; views count once."""
    found, seen, left = {}, set(), [what]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, torch.nn.Module | torch.nn.Parameter | Mapped):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        else:
            left += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(found.values())
