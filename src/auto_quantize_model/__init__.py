"""Per-op INT8 sensitivity of vision-language models, measured by Intel Neural Compressor's own mse_v2 helpers.

The public names are those of `__all__`. Each is imported when it is first used, so importing the package is instant.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_quantize_model.api import capture, frontier, load, plan, prepare, profiles, ranking, save
    from auto_quantize_model.files import InputError
    from auto_quantize_model.records import Capture, Frontier, Op, Plan, Point, Profile, Profiles, Score

_FUNCTIONS = ("prepare", "plan", "capture", "ranking", "frontier", "profiles", "save", "load")
_RECORDS = ("Op", "Plan", "Score", "Capture", "Point", "Frontier", "Profile", "Profiles")
__all__ = [
    "Capture",
    "Frontier",
    "InputError",
    "Op",
    "Plan",
    "Point",
    "Profile",
    "Profiles",
    "Score",
    "capture",
    "frontier",
    "load",
    "plan",
    "prepare",
    "profiles",
    "ranking",
    "save",
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
