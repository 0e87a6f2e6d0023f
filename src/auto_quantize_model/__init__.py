"""Per-op INT8 sensitivity of vision-language models, measured by Intel Neural Compressor's own mse_v2 helpers.

The public names are those of `__all__`. Each is imported when it is first used, so importing the package is instant.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_quantize_model.api import capture, load, plan, profiles, ranking, save, tradeoff
    from auto_quantize_model.files import InputError
    from auto_quantize_model.records import Capture, Op, Plan, Point, Profile, Profiles, Score, Tradeoff

_FUNCTIONS = ("plan", "capture", "ranking", "tradeoff", "profiles", "save", "load")
_RECORDS = ("Op", "Plan", "Score", "Capture", "Point", "Tradeoff", "Profile", "Profiles")
__all__ = [
    "Capture",
    "InputError",
    "Op",
    "Plan",
    "Point",
    "Profile",
    "Profiles",
    "Score",
    "Tradeoff",
    "capture",
    "load",
    "plan",
    "profiles",
    "ranking",
    "save",
    "tradeoff",
]


def __getattr__(name: str) -> Any:
    # Import statements, and no table of modules: `code` follows the statements.
    if name in _FUNCTIONS:
        from auto_quantize_model import api

        return getattr(api, name)
    if name in _RECORDS:
        from auto_quantize_model import records

        return getattr(records, name)
    if name == "InputError":
        from auto_quantize_model.files import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
