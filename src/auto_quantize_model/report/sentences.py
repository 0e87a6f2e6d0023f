"""The sentences of a report, for its Markdown and its page. In: the report. Out: text without markup."""

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from auto_quantize_model.measure.aggregate import interval_of_count
from auto_quantize_model.records import IncCheck, Output
from auto_quantize_model.report.coverage import in_bytes
from auto_quantize_model.schemes.scheme import INC_INT8, UNQUANTIZED

# How each map is read, with a place for the scheme.
DIRECTIONS = {
    "isolated": (
        "Only this op is in {scheme}, all others stay FP32. The value is the error that the op adds: the highest is the"
        " most sensitive."
    ),
    "fallback": (
        "Only this op stays FP32, all others are in {scheme}. The value is the error that is left: the lowest is the"
        " most sensitive."
    ),
    "requantize": (
        "Ops are quantized one after another in the plan's order, and each stays in {scheme}. The value is the error so"
        " far, a running total. It is not a score of the op, so this map has no ranks."
    ),
}

Report = dict[str, Any]
# With fewer correct answers of the unquantized model, one changed answer is a quarter of them: accuracy says nothing.
FEW_RIGHT = 5
# A quantized model that is below one of these limits is called broken.
BROKEN_SQNR_DB = 10.0  # a tenth of the output's power is error
BROKEN_TOP1 = 0.75  # share of positions at which the most likely token is that of FP32
BROKEN_ANSWERS = 0.75  # share of the correct answers that are left
# Columns that compare image tokens with text tokens. Without an image they are empty or repeat the whole.
BY_MODALITY = ("image_relative_error", "text_relative_error", "image_divergence", "text_divergence")
# Columns that only estimates fill.
OF_ESTIMATES = ("measured", "standard_error", "split_half")


def number(value: float | None, unit: str = "") -> str:
    """Four significant digits and a unit, a dash for null."""
    return "–" if value is None else f"{value:.4g} {unit}".strip()


def divergence_of(row: Mapping[str, Any], unit: str = "") -> str:
    """The divergence of an op. An estimate has a sign before it and its standard error after it."""
    if row["measured"]:
        return number(row["divergence"], unit)
    return f"≈ {row['divergence']:.2g} ± {row['standard_error']:.1g} {unit}".strip()


def percent(value: float | None) -> str:
    """A share as a percentage, a dash for null. A share between 0 and 1 is never rounded to 0 % or 100 %."""
    if value is None:
        return "–"
    text = f"{100 * value:.2f}"
    if text == "100.00" and value < 1:
        return "over 99.99 %"
    return "under 0.01 %" if text == "0.00" and value > 0 else f"{text} %"


def counted(count: int, thing: str, things: str = "") -> str:
    """A number and its thing, in the plural unless the number is 1."""
    return f"{count} {thing if count == 1 else things or f'{thing}s'}"


def fixed(value: float, form: str) -> str:
    """A number in a format such as `+.1f`. A tiny negative number is shown as 0 without a minus sign."""
    text = f"{value:{form}}"
    return text.replace("-", "+" if form[0] == "+" else "") if float(text) == 0 else text


def apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers with enough significant digits to tell them apart, and four or more."""
    texts = (f"{one:.4g}", f"{other:.4g}")
    for digits in range(5, 18):
        if texts[0] != texts[1] or one == other:
            break
        texts = (f"{one:.{digits}g}", f"{other:.{digits}g}")
    return texts


def joined(parts: list[str]) -> str:
    """The parts as an enumeration: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def sqnr(value: float | None) -> str:
    """An SQNR with its unit; null is an infinite one."""
    return "no error" if value is None else f"an SQNR of {value:.2f} dB"


# The profiles in the order in which one of them is the decision.
PROFILES = {
    "smallest": "the smallest measured choice that reaches the target",
    "balanced": "the knee of the measured curve, beyond which more bytes bring less",
    "safest": "the measured choice with the least loss within the budget",
}


def decided(report: Report) -> tuple[str, dict[str, Any]] | None:
    """The name and the profile that is the decision; None without any profile."""
    found = report["profiles"]["profiles"]
    return next(((name, found[name]) for name in PROFILES if name in found), None)


def unquantized(report: Report) -> dict[str, Any] | None:
    """The point of the unquantized model; None where nothing was measured."""
    if report["frontier"]["status"] != "measured":
        return None
    last: dict[str, Any] = report["frontier"]["points"][-1]
    return last


def states(report: Report) -> list[dict[str, Any]]:
    """The states to compare on held-out samples: each profile, each uniform scheme, and the unquantized model."""
    if report["frontier"]["status"] != "measured":
        return []
    found = [{"state": name, **profile["point"]} for name, profile in report["profiles"]["profiles"].items()]
    uniform = [point for point in report["frontier"]["controls"] if point["kind"] == "uniform"]
    found += [{"state": f"all {point['name']}", **point} for point in uniform]
    return [*found, {"state": UNQUANTIZED, **report["frontier"]["points"][-1]}]


def output(report: Report) -> Output:
    """What was measured, with the words for it."""
    return Output(**report["measurement"]["output"])


def same_choice(what: Output, share: float | None) -> list[str]:
    """At how many positions the model chooses the same; no sentence for embeddings, which choose nothing."""
    where = {"token": "positions", "sample": "samples"}.get(what.position)
    if share is None or where is None:
        return []
    return [f"The most likely {what.choice} stays the same at {percent(share)} of the {where}."]


def in_main(report: Report) -> str:
    """The main scheme in words."""
    return "INT8" if report["main_scheme"] == INC_INT8 else str(report["main_scheme"])


def lead(report: Report) -> str:
    """What the scores are, before a colon."""
    if report["main_scheme"] == INC_INT8:
        return "The sensitivity of each op by Intel Neural Compressor's mse_v2:"
    return f"The sensitivity of each op in {report['main_scheme']}, by its {output(report).divergence}:"


def has_images(report: Report) -> bool:
    """Whether scored batches hold images and text, so that both can be compared."""
    return any(batch["image_tokens"] for batch in report["batches"]) and any(
        batch["image_tokens"] < batch["tokens"] for batch in report["batches"]
    )


def has_router(report: Report) -> bool:
    """Whether routers choose experts in the model."""
    return report["all_ops"]["router_agreement"] is not None


def has_times(report: Report) -> bool:
    """Whether the config has a table of times."""
    return report["frontier"]["status"] == "measured" and report["frontier"]["points"][0]["seconds"] is not None


def tokens(report: Report) -> str:
    """The number of tokens in the scored batches, and of image tokens among them if there are any."""
    of_images, of_all = (sum(batch[key] for batch in report["batches"]) for key in ("image_tokens", "tokens"))
    if of_images == of_all:
        return counted(of_all, "image")
    return f"{of_images} image tokens among {of_all}" if of_images else counted(of_all, "token")


def heldout(report: Report) -> str:
    """The number of held-out samples, and of positions in them if these are more."""
    found, position = report["frontier"], output(report).position
    samples = counted(found["samples"], "held-out sample")
    return samples if position == "sample" else f"{samples} with {counted(found['tokens'], position)}"


def decision(report: Report) -> tuple[str, str]:
    """The decision which op gets which scheme, in one sentence, and what it costs with its reason.

    It reads only `profiles` and `frontier` of the report.
    """
    found = decided(report)
    if found is None:
        missed = report["profiles"]["missed"]
        why = dict.fromkeys(f"{reason[:1].upper()}{reason[1:]}." for reason in missed.values())
        return "Nothing is decided.", " ".join(why)
    name, profile = found
    point = profile["point"]
    only = set(point["schemes"])
    if len(only) == 1:
        what = f"Quantize to {only.pop()} every op that can have this scheme: {point['bits']:.2f} bits a weight."
    else:
        what = f"Quantize to {point['bits']:.2f} bits a weight on average: {mixture(report, point)}."
    return what, f"{lost(report, point)} {weighs(report, point)} This is {PROFILES[name]}{because(report, name)}."


def mixture(report: Report, point: Mapping[str, Any]) -> str:
    """How many ops have each scheme in a choice."""
    counts: Counter[str] = Counter()
    for unit, scheme in zip(report["frontier"]["units"], point["schemes"], strict=True):
        counts[scheme] += len(unit["ops"])
    chosen = [scheme for scheme in report["frontier"]["candidates"] if counts[scheme]]
    named = [f"{counted(counts[scheme], 'op')} in {scheme}" for scheme in chosen]
    left = [f"{counts[UNQUANTIZED]} unquantized"] if counts[UNQUANTIZED] else []
    return joined([*named, *left])


def mixture_of_units(report: Report, point: Mapping[str, Any]) -> str:
    """How many units have each scheme in a choice, for a table."""
    schemes = (*report["frontier"]["candidates"], UNQUANTIZED)
    counts = {scheme: point["schemes"].count(scheme) for scheme in schemes}
    return ", ".join(f"{count} {scheme}" for scheme, count in counts.items() if count)


def lost(report: Report, point: Mapping[str, Any]) -> str:
    """What a user of the model loses with a choice, measured on the held-out samples."""
    what = output(report)
    low, high = (number(point[key]) for key in ("divergence_low", "divergence_high"))
    mean = f"{number(point['divergence'], what.unit)} per {what.position}"
    parts = [
        f"On held-out samples the {what.divergence} from the unquantized model is {mean} (95 % interval {low} to"
        f" {high}).",
        *same_choice(what, point["top1_agreement"]),
    ]
    return " ".join([*answers_lost(report, point), *parts])


def right_before(report: Report) -> int | None:
    """How many answers are right without quantization; None where no answer was measured."""
    whole = unquantized(report)
    return (
        None if whole is None or whole["accuracy"] is None else round(whole["accuracy"] * report["frontier"]["answers"])
    )


def answers_lost(report: Report, point: Mapping[str, Any]) -> list[str]:
    """How many answers a choice loses, next to the smallest measured choice; no sentence without answers."""
    before, lost = right_before(report), point["answers_lost"]
    if before is None or lost is None:
        return []
    answers = report["frontier"]["answers"]
    if before < FEW_RIGHT:
        return [f"The unquantized model itself gives only {before} of {answers} answers right, too few to judge by."]
    low, high = interval_of_count(lost, before)
    now = round(point["accuracy"] * answers)
    what = (
        f"Of {before} answers that are right without quantization, {lost or 'none'} {'is' if lost < 2 else 'are'} lost"
    )
    found = [f"{what} (95 % interval {low} to {high})."]
    if gained := now - before + lost:
        found.append(f"{gained} wrong {'one becomes' if gained == 1 else 'ones become'} right.")
    least = report["frontier"]["points"][0]
    if least["weight_bytes"] < point["weight_bytes"] and least["answers_lost"] > lost:
        found.append(f"The smallest measured choice, with {least['bits']:.2f} bits, loses {least['answers_lost']}.")
    return found


def weighs(report: Report, point: Mapping[str, Any]) -> str:
    """The bytes of a choice next to those of the unquantized model."""
    whole = unquantized(report)
    share = f", {percent(point['weight_bytes'] / whole['weight_bytes'])} of those without quantization" if whole else ""
    time = "" if point["seconds"] is None else f" By the config's table the ops take {point['seconds']:.3g} s."
    needed = point["active_bytes"]
    active = "" if needed is None else f" One token needs {in_bytes(needed, 4)} of them."
    return f"The weights take {in_bytes(point['weight_bytes'], 4)}{share}.{active}{time}"


def because(report: Report, name: str) -> str:
    """The target or the budget that a profile stands for, in brackets; empty for the knee."""
    of_loss = ("max_divergence", "max_accuracy_drop", "min_sqnr_db")
    of_budget = ("max_bits", "max_weight_bytes", "max_seconds")
    keys = {"smallest": of_loss, "safest": of_budget}
    asked = report["profiles"]["target"]
    parts = [f"{key} {asked[key]:g}" for key in keys.get(name, ()) if asked.get(key) is not None]
    return f" ({', '.join(parts)})" if parts else ""


def of_profiles(report: Report) -> list[str]:
    """A line for each profile, and the reason for each that does not exist."""
    found = report["profiles"]
    lines = [
        f"{name}: {profile['point']['bits']:.2f} bits a weight, {mixture(report, profile['point'])};"
        f" {output(report).short} {number(profile['point']['divergence'], output(report).unit)}"
        for name, profile in found["profiles"].items()
    ]
    return [*lines, *(f"{name}: none, because {why}" for name, why in found["missed"].items())]


def closing(report: Report, page: str, exports: str, configs: str, elsewhere: str = "") -> list[str]:
    """The last lines of a run: its warnings, the decision, the page and the next step.

    Args:
        report: of the run.
        page: path of its HTML page.
        exports: path of the folder of exports.
        configs: the config files of the command line, with spaces between them; empty for the default config.
        elsewhere: options of Snakemake that name Snakefile and working directory; empty in the checkout, for make.
    """
    warnings = [f"warning: {sentence}" for sentence in (*report["warnings"], *breaks(report))]
    what, why = decision(report)
    again = f" CONFIG={configs}" if configs and " " not in configs else f' CONFIG="{configs}"' if configs else ""
    found = decided(report)
    given = f" --configfile {configs}" if configs else ""
    run = f"snakemake {elsewhere} --cores all{given}"
    if not found:
        step = f"change the config's blocks decide and profiles, then `{run if elsewhere else f'make run{again}'}`"
    elif INC_INT8 in report["frontier"]["candidates"] and report["measurement"]["inc_check"]["status"] == "cannot":
        step = f"use an export in {exports}"
    elif elsewhere:
        step = f"{run} --config quantize='{{profile: {found[0]}}}' -- quantize_model"
    else:
        step = f"make quantize PROFILE={found[0]}{again}"
    return [*warnings, f"Decision: {what} {why}".strip(), f"The page: {page}", f"Next: {step}"]


def quantized(record: Mapping[str, Any], folder: str) -> str:
    """Where the quantized model lies, and how its error compares with the profile's. In: the command's record."""
    what = "The checkpoint" if record["kind"] == "checkpoint" else "INC's INT8 model"
    if record["status"] == "bit_identical":
        found = "Loaded back, its error on held-out samples is bit for bit the profile's."
    else:
        found = (
            "The profile was measured on another device or CPU, so the error of the loaded model has other last bits."
        )
    return f"{what} by the profile {record['profile']}: {folder}. {found}"


def breaks(report: Report) -> list[str]:
    """Why the main scheme, or the decided profile, counts as broken, with values and limits.

    The main scheme is measured on the calibration batches. The list is empty where both work.
    """
    found = []
    if damage := damages(report, report["all_ops"] | {"accuracy": None}):
        what = "INC's INT8" if report["main_scheme"] == INC_INT8 else report["main_scheme"]
        all_ops = f"every op in {in_main(report)}, on the calibration batches"
        found.append(f"{what} breaks this model ({all_ops}). {' '.join(damage)}")
    if (profile := decided(report)) and (left := damages(report, profile[1]["point"])):
        found.append(f"The profile {profile[0]} breaks the model. {' '.join(left)} Choose a stricter target.")
    return found


def damages(report: Report, state: Mapping[str, Any]) -> list[str]:
    """A sentence for each value of a state that is below the limit of a model that works."""
    found = []
    if state["sqnr_db"] is not None and state["sqnr_db"] < BROKEN_SQNR_DB:
        found.append("The SQNR is {} dB (limit {} dB).".format(*apart(state["sqnr_db"], BROKEN_SQNR_DB)))
    top1 = state["top1_agreement"]
    if top1 is not None and top1 < BROKEN_TOP1:
        same, limit = apart(100 * top1, 100 * BROKEN_TOP1)
        choice = output(report).choice
        found.append(f"The most likely {choice} stays the same at {same} % of the positions (limit {limit} %).")
    whole = unquantized(report)
    if whole and state["accuracy"] is not None and whole["accuracy"] * report["frontier"]["answers"] > FEW_RIGHT - 0.5:
        left, before = percent(state["accuracy"]), percent(whole["accuracy"])
        if state["accuracy"] < BROKEN_ANSWERS * whole["accuracy"]:
            limit = f"limit {100 * BROKEN_ANSWERS:g} % of that"
            found.append(f"{left} of the answers are right, and {before} without quantization ({limit}).")
    return found


def costs(report: Report) -> list[str]:
    """What each profile costs, in sentences; without a frontier, what INT8 costs on the calibration batches."""
    if report["frontier"]["status"] != "measured":
        return without_frontier(report)
    return of_profiles(report)


def without_frontier(report: Report) -> list[str]:
    """The cost of the main scheme on the calibration batches, where no held-out samples were measured."""
    all_ops, scheme = report["all_ops"], in_main(report)
    found = [
        f"Nothing was decided: {report['frontier']['reason']}. The calibration batches show only the cost of {scheme}."
    ]
    found += same_choice(output(report), all_ops["top1_agreement"])
    return [*found, f"With every op in {scheme} the output has {sqnr(all_ops['sqnr_db'])}."]


def certainty(report: Report) -> list[tuple[str, str]]:
    """How sure the decision and the ranking are: each check with its result."""
    found = proof(report["frontier"])
    if report["stability"] is None:
        return [*found, ("Ranking", "The isolated map was not measured, so there is no ranking.")]
    rows = report["maps"]["isolated"]["ops"]
    ops = len(rows)
    measured = sum(row["measured"] for row in rows)
    if measured < ops:
        found.append(("Estimates", of_effort(report)))
    if ops and measured < 2:
        return [*found, ("Ranking", "No two ops were measured alone, so nothing shows how steady the scores are.")]
    if not ops:
        return [*found, ("Ranking", "No op ran on the scored batches, so there is no ranking.")]
    return found + between(report["stability"], ops, measured, output(report).divergence)


RULES = {"random": "random choices", "edges": "choices with the first and last layers first"}


def proof(frontier: dict[str, Any]) -> list[tuple[str, str]]:
    """The frontier against its controls at equal bytes, and how far sums of losses predict what was measured."""
    if frontier["status"] != "measured":
        return []
    found = []
    for kind, title in RULES.items():
        if rows := [row for row in frontier["comparisons"] if row["kind"] == kind]:
            found.append((f"Against {title}", against(rows, title)))
    made = frontier["prediction"]
    if made["tau"] is not None:
        text = (
            f"Sums of the units' losses order {made['compared']} measured choices with a Kendall's tau of"
            f" {fixed(made['tau'], '.2f')}"
        )
        if made["ratio"]:
            text += f". The measured divergence is {made['ratio']:.2f} times the sum, as a geometric mean"
        found.append(("Predicted", f"{text}."))
    return found


def against(rows: list[dict[str, Any]], title: str) -> str:
    """How often controls lose more than the frontier at equal bytes, and where they lose less."""
    more = sum(row["low"] > 0 for row in rows)
    ratios = [row["divergence"] / row["frontier_divergence"] for row in rows if row["frontier_divergence"]]
    text = (
        f"At equal bytes {more} of {len(rows)} {title} {'loses' if more == 1 else 'lose'} more than the frontier,"
        " beyond the 95 % interval."
    )
    if ratios:
        text += f" The median divergence of these controls is {number(statistics.median(ratios))} times that of the"
        text += " frontier."
    if less := [f"{row['bits']:.2f}" for row in rows if row["high"] < 0]:
        text += f" {len(less)} of them lost less than the frontier, at {joined(less)} bits."
    return text


def between(stability: dict[str, Any], ops: int, measured: int, divergence: str) -> list[tuple[str, str]]:
    """How far batches and metrics agree on the ranking, whether errors add up, and how many ops are tied."""
    found: list[tuple[str, str]] = []
    over = f" over the {measured} measured ops" if measured < ops else ""
    if stability["rank_tau"] is None and stability["batches"] > 1:
        unknown = "Unknown: fewer than two ops ran in every batch, or a batch gives all of them the same value."
        found.append(("Between batches", unknown))
    elif stability["rank_tau"] is None:
        found.append(
            ("Between batches", "Unknown, because only one batch was scored; raise sensitivity.confidence_batches.")
        )
    else:
        mean = fixed(stability["rank_tau"], ".2f")
        text = f"{stability['batches']} batches agree on the order with a Kendall's tau of {mean}{over}"
        lowest = f"lowest {fixed(stability['rank_tau_lowest'], '.2f')}; " if stability["batches"] > 2 else ""
        text += f" ({lowest}1 is the same order, 0 is chance)."
        if stability["top"] == 1 and stability["top_shared"] is not None:
            text += f" The most sensitive op is {'' if stability['top_shared'] else 'not '}the same in every batch."
        elif stability["top"] and stability["top_shared"] is not None:
            text += (
                f" {stability['top_shared']} of the {stability['top']} most sensitive ops are the same in every batch."
            )
        found.append(("Between batches", text))
    if stability["metric_tau"] is not None:
        metric_tau = fixed(stability["metric_tau"], ".2f")
        text = f"Squared error and {divergence} order the ops with a tau of {metric_tau}{over}."
        found.append(("Between metrics", text))
    if stability["additivity"] is not None and ops > 1:
        text = (
            f"The errors of single ops add up to {stability['additivity']:.3g} times the error with every op quantized"
        )
        far = abs(stability["additivity"] - 1) > 0.2
        text += ". Errors cancel or add to each other, so choices must be measured." if far else ": nearly a sum."
        found.append(("As a sum", text))
    ties = f"{stability['ties']} of {measured} ops share their value with another op, so their order means nothing."
    return [*found, ("Ties", ties if stability["ties"] else "None: every op has its own value.")]


def activations(plan: Mapping[str, Any]) -> str:
    """How many bits activations have and who chose them. `plan` is a plan or the `measurement` of a report."""
    bits = "7 bits of 8" if plan["reduce_range"] else "all 8 bits"
    by_inc = f"Intel Neural Compressor's choice on a CPU {'without' if plan['reduce_range'] else 'with'} VNNI"
    chosen = by_inc if plan["reduce_range_by"] == "inc" else "set by sensitivity.reduce_range"
    return f"Activations are quantized to {bits}: {chosen}."


def of_inc_check(inc_check: IncCheck) -> list[str]:
    """Why Intel Neural Compressor could not measure the model, and what was done instead; empty where it could."""
    if inc_check["status"] == "no_plan":
        return [
            f"{INC_INT8} is not measured: {inc_check['reason']}. The other schemes need no plan of Intel Neural"
            " Compressor."
        ]
    if inc_check["status"] != "cannot":
        return []
    return [
        f"Intel Neural Compressor cannot measure this model: {inc_check['reason']}. All scores come from the"
        " replay. The audit compares them with torch's own quantized modules."
    ]


def of_head(measurement: Mapping[str, Any]) -> list[str]:
    """That the model changes its logits after the measured op, where it does. In: the report's `measurement`."""
    if not measurement["head_only"]:
        return []
    return [
        f"The model scales or caps what {measurement['measured_op']} returns. Errors and divergences are those of the"
        " output of that op, before the change."
    ]


AUDITORS = {
    "inc": "Intel Neural Compressor's unmodified helpers",
    "torch": "torch's own quantized modules in the FP32 model",
}


def of_schemes(report: Report) -> str:
    """What the table of schemes shows."""
    what = output(report)
    return (
        f"{joined(['SQNR', what.divergence, *['top-1'] * bool(what.choice)])} are those of the model with all ops in"
        f" the scheme that can have it. Ops are ranked by the {what.divergence} that each adds alone."
        + " The column router is the share of the routers' choices of experts that stay as in FP32."
        * has_router(report)
    )


def of_effort(report: Report) -> str:
    """How many scores of the isolated map were measured, and how far the estimates of the others can be trusted."""
    effort, found = report["measurement"]["effort"], []
    rows = [row for scheme in report["schemes"].values() for row in scheme["ops"]] or report["maps"]["isolated"]["ops"]
    measured = sum(row["measured"] for row in rows)
    found.append(
        f"Of {counted(len(rows), 'score')} of the isolated map {measured} were measured. The others are estimates by"
        f" {effort['probes']} Fisher probes, marked with ≈ and shown with their standard error."
    )
    checks = {name: scheme["estimates"] for name, scheme in report["schemes"].items() if scheme["estimates"]}
    known = {name: check for name, check in checks.items() if check["tau"] is not None and check["ratio"] is not None}
    if known:
        taus = joined([f"{check['tau']:.2f} in {name}" for name, check in known.items()])
        ratios = joined([f"{check['ratio']:.2f} times in {name}" for name, check in known.items()])
        found.append(
            f"Where an op has both, estimate and score order the ops with a Kendall's tau of {taus}. The estimates sum"
            f" up to {ratios} the scores. Large errors are underestimated."
        )
    return " ".join(found)


def of_divergence(report: Report) -> str:
    """What the divergence and the top-1 agreement are."""
    what = output(report)
    if not what.choice:
        return (
            "The cosine distance is 1 minus the cosine of the angle between an embedding and that of FP32. The mean is"
            " over the positions of the last hidden state."
        )
    of = "next-token distribution" if what.choice == "token" else "distribution over classes"
    where = "samples" if what.position == "sample" else "positions"
    return (
        f"KL is the divergence of the {of} from that of FP32, in nats, averaged over {where}. Top-1 is the share of"
        f" {where} whose most likely {what.choice} stays the same."
    )


def of_agreement(report: Report) -> str:
    """What the table of agreements shows."""
    return (
        f"How far two schemes agree on which ops are sensitive. Kendall's tau of the {output(report).divergence}s is 1"
        " for the same order and 0 for chance. The last column counts the most sensitive ops that both share."
    )


def refusals(report: Report) -> list[str]:
    """A sentence for each scheme that some ops cannot have."""
    return [f"{cannot(name, found)}." for name, scheme in report["schemes"].items() if (found := scheme["refused"])]


def cannot(scheme: str, refused: Mapping[str, str]) -> str:
    """How many ops cannot have a scheme, with the most common reason and an op that has this reason."""
    reason, count = Counter(refused.values()).most_common(1)[0]
    op_name = next(name for name, found in refused.items() if found == reason)
    others = f" ({counted(len(refused) - count, 'op')} for other reasons)" if count < len(refused) else ""
    return f"{counted(len(refused), 'op')} cannot have {scheme}, such as {op_name}: {reason}{others}"


def audited(report: Report) -> str:
    """Which values were measured again, and by whom, in sentences."""
    audit = report["audit"]
    ops, batch, auditor = counted(len(audit["ops"]), "op"), audit["batch"], AUDITORS[audit["by"]]
    why = " Intel Neural Compressor cannot measure this model." if audit["by"] == "torch" else ""
    counts = joined([f"{counted(count, 'value')} of {scheme}" for scheme, count in audit["served"].items()])
    served = f" The modules of compressed-tensors gave the same bits on the CPU: {counts}." if counts else ""
    estimated = report["measurement"]["effort"]["exact"] == "none" and audit["ops"]
    alone = (
        " The scores of these ops alone are estimates, so the replay measured them for the audit." if estimated else ""
    )
    return of_inc(audit, ops, batch, auditor, why) + alone + served


def of_inc(audit: dict[str, Any], ops: str, batch: int | None, auditor: str, why: str) -> str:
    """The part of `audited` about `inc_int8`."""
    if audit["status"] == "not_measured":
        return f"{INC_INT8} was not measured, so Intel Neural Compressor measured nothing again."
    if audit["status"] != "not_needed" and not audit["ops"]:
        return f"Nothing was measured again: no op ran on batch {batch}."
    if audit["status"] == "bit_identical":
        values = f"{counted(audit['compared'], 'value')} ({ops}, maps {', '.join(audit['maps'])}, batch {batch})"
        return (
            f"{values} {'was' if audit['compared'] == 1 else 'were'} measured again by {auditor}: every one is the"
            f" same, bit for bit.{why}"
        )
    if audit["status"] == "sites_bit_identical":
        agreement = ", ".join(
            f"{name} {'unknown' if value is None else number(value)}" for name, value in audit["rank_agreement"].items()
        )
        return (
            f"The INT8 outputs of {ops} are the same on this device and on the CPU, bit for bit. Rank correlation"
            f" with {auditor} on the CPU over these ops (batch {batch}): {agreement or 'not computed'}.{why}"
        )
    return "Not needed: Intel Neural Compressor itself measured every op."
