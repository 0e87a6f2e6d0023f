"""The sentences about why units break, and about what regains their loss.

In: the parts of the report's `why`, which are the records `Cause`, `Cure` and `Cured` as JSON. Out: text without
markup.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from auto_quantize_model.records import NotMeasured
from auto_quantize_model.report.coverage import in_bytes
from auto_quantize_model.report.sentences import counted, joined, number, output, percent

Row = Mapping[str, Any]
NOT_EXPLAINED = NotMeasured("not_measured", "no cure was tried")
NAMES = {
    "smoothing": "smoothing {}",
    "mse_weight": "MSE ranges of the weight",
    "percentile_inputs": "inputs clipped at the percentile {}",
    "asymmetric_inputs": "asymmetric inputs",
}
MOST = 2.0  # a side that alone costs so many times the other breaks the unit
SMALL_DB = 0.05  # a smaller change of the SQNR is none
HEAVY = 3.0  # excess kurtosis, from which on a weight has heavy tails


def explained(report: Row) -> str:
    """What the section shows, or why there is none."""
    why = report["why"]
    if why["status"] != "measured":
        return f"Not explained: {why['reason']}."
    if not why["causes"]:
        return "No unit loses anything in a candidate scheme, so there is nothing to explain."
    skipped = "".join(f" {text}." for text in why["skipped"])
    return (
        "The units with the largest losses, and those with the largest losses in each profile. Each unit is quantized"
        f" alone. The calibration samples choose the setting of a cure, and {counted(why['heldout_samples'], 'sample')}"
        f" held out say whether the cure helps. Outliers and kurtosis describe a unit. They do not rank units.{skipped}"
    )


def of_cause(cause: Row, unit: str = "nats") -> list[str]:
    """Why a unit breaks: its loss, the loss of each side alone, and what its inputs and its weight look like."""
    return [of_loss(cause, unit), of_sides(cause, unit), *of_inputs(cause), *of_weight(cause)]


def of_loss(cause: Row, unit: str) -> str:
    """What the unit alone costs, and which profiles have it so."""
    whole, held = cause["whole"], cause["profiles"]
    used = f"The {'profile' if len(held) == 1 else 'profiles'} {joined(held)} {'has' if len(held) == 1 else 'have'}"
    return (
        f"Alone in {cause['scheme']} the unit costs {number(loss_of(whole), unit)} on held-out samples and"
        f" {number(loss_of(whole, 'calibration'))} on calibration samples."
        f" {used if held else 'No profile has'} the unit in this scheme."
    )


def of_sides(cause: Row, unit: str = "nats") -> str:
    """Which side breaks the unit."""
    weight, inputs = loss_of(cause["weight_alone"]), loss_of(cause["inputs_alone"])
    if not inputs:
        return "The scheme leaves inputs unquantized, so the weight costs all."
    told = f"The weight alone costs {number(weight, unit)} and the inputs alone {number(inputs)}"
    if weight >= MOST * inputs:
        return f"{told}: the weight breaks the unit."
    if inputs >= MOST * weight:
        return f"{told}: the inputs break the unit."
    return f"{told}: both break the unit."


def of_inputs(cause: Row) -> Iterator[str]:
    """Outlier channels, values beyond the calibration's range, and the ranges by modality."""
    found = cause["inputs"]
    if found["outliers"]:
        shown = joined([f"{channel['index']} ({channel['ratio']:.3g} times)" for channel in found["outliers"]])
        more = found["outlier_count"] - len(found["outliers"])
        yield (
            f"Outlier channels, against the largest magnitude of the median channel: {shown}"
            f"{f' and {more} more' if more else ''}."
        )
    else:
        yield "No input channel is an outlier of six times the median channel."
    low, high = found["calibration_range"]
    yield (
        f"The calibration saw inputs from {low:.3g} to {high:.3g}; {percent(found['clipped'])} of the held-out values"
        " lie beyond."
    )
    ranges = {part: found[f"{part}_range"] for part in ("image", "text") if found[f"{part}_range"]}
    if len(ranges) == 2:
        parts = [f"from {low:.3g} to {high:.3g} at {part} positions" for part, (low, high) in ranges.items()]
        yield f"On held-out samples the inputs reach {joined(parts)}."


def of_weight(cause: Row) -> Iterator[str]:
    """The kurtosis of the weight, and its clipped values."""
    found = cause["weight"]
    tails = ", so its tails are heavy" if found["kurtosis"] > HEAVY else ""
    yield (
        f"The weight has an excess kurtosis of {found['kurtosis']:.3g}{tails}. Row {found['worst_row']} of"
        f" {found['worst_op']} has the highest, {found['worst_kurtosis']:.3g}. The scheme clips"
        f" {percent(found['clipped'])} of its values."
    )


def name_of(cure: Row) -> str:
    """A cure with its setting."""
    return joined([NAMES[kind].format(setting) for kind, setting in cure["settings"].items()])


def of_cure(cause: Row, cure: Row, unit: str = "nats") -> str:
    """What a cure regains, in the divergence's unit and in dB, and what it costs; or why it cannot be applied."""
    if cure["reason"]:
        name = NAMES[cure["kind"]].format("").replace("percentile ", "percentile").strip()
        return f"{name[:1].upper()}{name[1:]}: not applicable, because {cure['reason']}."
    name, many = name_of(cure), len(cure["settings"]) > 1 or cure["kind"] != "smoothing"
    change = of_change(cure, loss_of(cause["whole"]), many, unit)
    told = f"{name[:1].upper()}{name[1:]} {change}, for {in_bytes(cure['extra_bytes'])}. {of_decibels(cause, cure)}"
    if cure["folds_into"]:
        told += f" The scale folds into {cure['folds_into']}."
    if cure["at_run_time"]:
        told += f" But {cure['at_run_time']}."
    return told.replace("  ", " ").strip()


def of_change(cure: Row, before: float, many: bool, unit: str) -> str:
    """What a cure regains of a loss on held-out samples, beyond the interval or not."""
    end = "" if many else "s"
    if cure["low"] > 0:
        interval = f"(95 % interval {number(cure['low'])} to {number(cure['high'])})"
        return f"regain{end} {number(cure['regained'])} of {number(before, unit)} {interval}"
    if cure["high"] < 0:
        interval = f"(95 % interval {number(-cure['high'])} to {number(-cure['low'])})"
        return f"cost{end} {number(-cure['regained'], unit)} more than the {number(before)} before {interval}"
    interval = f"(95 % interval {number(cure['low'])} to {number(cure['high'])})"
    return f"show{end} no sure gain on {number(before, unit)} {interval}"


def best_of(cause: Row) -> Row | None:
    """The cure that regains most on held-out samples, beyond its interval; None where no cure helps."""
    helping = [cure for cure in cause["cures"] if cure["low"] is not None and cure["low"] > 0]
    return max(helping, key=lambda cure: cure["regained"], default=None)


def of_decibels(cause: Row, cure: Row) -> str:
    """The change of the SQNR on held-out samples, next to what the treated side costs."""
    of_weight = set(cure["settings"]) == {"mse_weight"}
    before, after = decibels(cause["whole"]), decibels(cure["damage"])
    other = decibels(cause["inputs_alone" if of_weight else "weight_alone"])
    if before is None or after is None or abs(after - before) < SMALL_DB:
        return "The SQNR stays the same."
    if after < before:
        return f"The SQNR falls by {before - after:.1f} dB."
    if other is None or other - before < SMALL_DB or len(cure["settings"]) > 1:
        return f"The SQNR rises by {after - before:.1f} dB."
    side = "the quantized weight costs" if of_weight else "the quantized inputs cost"
    return f"The SQNR regains {after - before:.1f} of the {other - before:.1f} dB that {side}."


def instead(report: dict[str, Any], cause: Row) -> str:
    """What more bytes would buy: the smallest larger scheme of the unit that loses less."""
    unit = next(unit for unit in report["frontier"]["units"] if unit["name"] == cause["unit"])
    size, loss = unit["bytes"][cause["scheme"]], unit["loss"][cause["scheme"]]
    larger = [name for name, own in unit["bytes"].items() if own > size and unit["loss"][name] < loss]
    if not larger:
        return ""
    best = min(larger, key=lambda name: (unit["bytes"][name], unit["loss"][name]))
    return (
        f"Without a cure, {best} takes {in_bytes(unit['bytes'][best] - size)} more and costs"
        f" {number(unit['loss'][best], output(report).unit)} on calibration samples."
    )


def of_cured(cured: Row, unit: str = "nats") -> str:
    """What the cures of several units regain in a whole profile."""
    if not cured["units"]:
        return (
            f"Cures help {joined(cured['tried'])} alone. In the whole profile they do not help on the calibration"
            " samples, so they are not exported."
        )
    many = len(cured["units"]) > 1
    change = of_change(cured, cured["before"], many, unit)
    end = "" if cured["low"] > 0 else ", so nothing is exported"
    return (
        f"In the whole profile, on all its held-out samples, the cure{'s' if many else ''} of"
        f" {joined(cured['units'])} {change}{end}."
    )


def loss_of(damage: Row, part: str = "heldout") -> float:
    """The divergence of a state on held-out or on calibration samples."""
    found: float = damage[part]["divergence"]
    return found


def decibels(damage: Row) -> float | None:
    """The SQNR of a state on held-out samples; None for no error."""
    found: float | None = damage["heldout"]["sqnr_db"]
    return found
