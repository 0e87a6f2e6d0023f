"""The sentences of a report, for its Markdown and its page. In: the report. Out: text without markup."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from auto_quantize_model.records import IncCheck
from auto_quantize_model.report import coverage

# How each map is read.
DIRECTIONS = {
    "isolated": (
        "Only this op is INT8, all others stay FP32. The value is the error that the op adds: the highest is the most"
        " sensitive."
    ),
    "fallback": (
        "Only this op stays FP32, all others are INT8. The value is the error that is left: the lowest is the most"
        " sensitive."
    ),
    "requantize": (
        "Ops are quantized one after another in the plan's order, and each stays INT8. The value is the error so far, a"
        " running total. It is not a score of the op, so this map has no ranks."
    ),
}

Report = dict[str, Any]
# With fewer correct answers in FP32, one changed answer is a quarter of them or more: the accuracy says nothing.
FEW_RIGHT = 5
# An INT8 model that is below one of these limits is called broken.
BROKEN_SQNR_DB = 10.0  # a tenth of the output's power is error
BROKEN_TOP1 = 0.75  # share of positions at which the most likely token is that of FP32
BROKEN_ANSWERS = 0.75  # share of the correct answers of FP32 that are left
# Columns that compare image tokens with text tokens. Without an image they are empty or repeat the whole.
BY_MODALITY = ("image_relative_error", "text_relative_error", "image_kl_divergence", "text_kl_divergence")
# Columns that only estimates fill.
OF_ESTIMATES = ("measured", "standard_error", "split_half")


def number(value: float | None, unit: str = "") -> str:
    """Four significant digits and a unit, a dash for null."""
    return "–" if value is None else f"{value:.4g} {unit}".strip()


def kl_of(row: Mapping[str, Any], unit: str = "") -> str:
    """The KL divergence of an op. An estimate has a sign before it and its standard error after it."""
    if row["measured"]:
        return number(row["kl_divergence"], unit)
    return f"≈ {row['kl_divergence']:.2g} ± {row['standard_error']:.1g} {unit}".strip()


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


def megabytes(value: float) -> str:
    """Bytes as MB, or GB from 1000 MB on."""
    return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"


def sqnr(value: float | None) -> str:
    """An SQNR with its unit; null is an infinite one."""
    return "no error" if value is None else f"an SQNR of {value:.2f} dB"


def states(report: Report) -> list[dict[str, Any]]:
    """The states measured on held-out samples: every op in INT8, the recommended profile, and every op in FP32."""
    if report["tradeoff"]["status"] != "measured":
        return []
    curve = report["tradeoff"]["curves"]["ranking"]
    found = [{"state": "every op in INT8", **curve[0]}]
    best = report["profiles"]["profiles"].get("recommended")
    if best and best["keep"]:
        found.append({"state": "recommended", **best})
    if curve[-1]["keep"] == report["tradeoff"]["ops"]:
        found.append({"state": "every op in FP32", **curve[-1]})
    return found


ORDERS = {
    "ranking": "along the ranking",
    "greedy": "found by the greedy refinement",
    "weight_bytes": "the largest weights first",
}


def has_images(report: Report) -> bool:
    """Whether a scored batch holds an image."""
    return any(batch["image_tokens"] for batch in report["batches"])


def tokens(report: Report) -> str:
    """The number of tokens in the scored batches, and of image tokens among them if there are any."""
    of_images, of_all = (sum(batch[key] for batch in report["batches"]) for key in ("image_tokens", "tokens"))
    return f"{of_images} image tokens among {of_all}" if of_images else counted(of_all, "token")


def decision(report: Report) -> tuple[str, str]:
    """The decision which ops to keep, in one sentence, and its reason.

    It reads only `profiles`, `tradeoff` and `coverage` of the report. Without `coverage` the sentences speak of the
    planned ops and not of the model.
    """
    best = report["profiles"]["profiles"].get("recommended")
    if best is None:
        missed = report["profiles"]["missed"]
        sentences = [f"{missed[:1].upper()}{missed[1:]}.", *instead(report)]
        return "No profile is recommended.", " ".join(sentences)
    target = {name: value for name, value in report["profiles"]["target"].items() if value is not None}
    only_bytes = set(target) == {"max_weight_bytes"}
    if not best["keep"]:
        if only_bytes:
            return f"{nothing(report)}: no measured keep-list within the budget has less error than INT8 as it is.", ""
        return f"{nothing(report)}: INT8 reaches the target as it is.", ""
    why = (
        "This is the measured keep-list with the least error within the budget"
        if only_bytes
        else "This is the shortest measured keep-list that reaches the target"
    )
    parts = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in target.items())
    why += f" ({', '.join(parts)}), {ORDERS[best['order']]}."
    return f"Keep {best['keep']} of {report['tradeoff']['ops']} ops in FP32.", why


def closing(report: Report, page: str, exports: str, configs: str) -> list[str]:
    """The last lines of a run: its warnings, the decision, the page and the next step.

    Args:
        report: of the run.
        page: path of its HTML page.
        exports: path of the folder of exports.
        configs: the config files of the command line, with spaces between them; empty for the default config.
    """
    warnings = [f"warning: {sentence}" for sentence in (*report["warnings"], *breaks(report))]
    what, why = decision(report)
    again = f" CONFIG={configs}" if configs and " " not in configs else f' CONFIG="{configs}"' if configs else ""
    if not report["profiles"]["profiles"].get("recommended"):
        step = f"change the target in the config's profiles block, then `make run{again}`"
    elif report["measurement"]["inc_check"]["status"] == "cannot":
        step = f"use an export in {exports}"
    else:
        step = f"make quantize PROFILE=recommended{again}"
    return [*warnings, f"Decision: {what} {why}".strip(), f"The page: {page}", f"Next: {step}"]


def quantized(record: dict[str, Any], folder: str) -> str:
    """Where INC's INT8 model lies and how its error compares with the profile's. In: the record of the comparison."""
    if record["status"] == "bit_identical":
        found = "its error on held-out samples is bit for bit the profile's"
    else:
        found = "its error cannot be compared bit for bit, because the profile was measured on another device or CPU"
    return f"INC's INT8 model by the profile {record['profile']}: {folder}; {found}."


def nothing(report: Report) -> str:
    """That no op is kept. This speaks of the whole model only where the planned ops hold most of its weights."""
    if "coverage" in report and not coverage.is_partial(report["coverage"]):
        return "Keep nothing"
    return f"Keep no op of the {report['tradeoff']['ops']} planned ones"


def int8_of(report: Report) -> str:
    """The name of what was quantized: plain INT8 only where the planned ops hold most of the weights."""
    return "INT8 of the planned ops" if coverage.is_partial(report["coverage"]) else "INT8"


def instead(report: Report) -> list[str]:
    """What to look at without a recommended profile: the keep-list nearest to the target, and the knee of the curve."""
    profiles = report["profiles"]
    found: list[str] = []
    if report["tradeoff"]["status"] != "measured":
        return found
    ops = report["tradeoff"]["ops"]
    if near := profiles["nearest"]:
        units: dict[str, Callable[[Any], str]] = {
            "max_weight_bytes": megabytes,
            "min_sqnr_db": lambda value: number(value, "dB"),
        }
        units["max_accuracy_drop"] = lambda value: f"{number(100 * value)} percentage points of accuracy"
        lacks = joined([units[part](value) for part, value in profiles["short"].items()])
        kept = (
            f"keeps {near['keep']} of {counted(ops, 'op')}, {ORDERS[near['order']]}" if near["keep"] else "keeps no op"
        )
        found.append(
            f"The measured keep-list nearest to the target {kept}. It has {sqnr(near['sqnr_db'])} and misses the target"
            f" by {lacks}."
        )
    if knee := profiles["knee"]:
        gained = knee["sqnr_db"] - report["tradeoff"]["curves"]["ranking"][0]["sqnr_db"]
        found.append(
            f"The knee of the measured curve is at {counted(knee['keep'], 'op')} of {ops}, {ORDERS[knee['order']]}."
            f" There the output has {sqnr(knee['sqnr_db'])}, {gained:.2f} dB more than with every op in INT8. Each"
            " further doubling of the list gains less."
        )
    return found


def breaks(report: Report) -> list[str]:
    """Why the INT8 model counts as broken, with values and limits, and whether the recommended profile repairs that.

    The values are from held-out samples, or from the calibration batches where no trade-off was measured. The list is
    empty where the INT8 model works.
    """
    known = {state["state"]: state for state in states(report)}
    int8 = known.get("every op in INT8") or report["all_int8"] | {"accuracy": None}
    fp32 = known.get("every op in FP32")
    where = "held-out samples" if known else "the calibration batches"
    damage = damages(report, int8, fp32)
    if not damage:
        return []
    found = [f"INT8 breaks this model (every op in INT8, on {where}). {' '.join(damage)}"]
    if (best := known.get("recommended")) and (left := damages(report, best, fp32)):
        found.append(f"The recommended profile does not repair that. {' '.join(left)} Choose a stricter target.")
    elif "recommended" in report["profiles"]["profiles"] and not best:
        found.append("The target is too loose to show that: choose a stricter one.")
    return found


def damages(report: Report, state: dict[str, Any], fp32: dict[str, Any] | None) -> list[str]:
    """A sentence for each value of a state that is below the limit of a model that works."""
    found = []
    if state["sqnr_db"] is not None and state["sqnr_db"] < BROKEN_SQNR_DB:
        found.append("The SQNR is {} dB (limit {} dB).".format(*apart(state["sqnr_db"], BROKEN_SQNR_DB)))
    top1 = state["top1_agreement"]
    if top1 is not None and top1 < BROKEN_TOP1:
        same, limit = apart(100 * top1, 100 * BROKEN_TOP1)
        found.append(f"The most likely token stays the same at {same} % of the positions (limit {limit} %).")
    if fp32 and enough_right(report, fp32) and state["accuracy"] < BROKEN_ANSWERS * fp32["accuracy"]:
        right = f"{percent(state['accuracy'])} of the answers are right, in FP32 {percent(fp32['accuracy'])}"
        found.append(f"{right} (limit {100 * BROKEN_ANSWERS:g} % of that).")
    return found


def enough_right(report: Report, fp32: dict[str, Any]) -> bool:
    """Whether FP32 gives enough held-out answers right to judge INT8 by its accuracy."""
    return fp32["accuracy"] is not None and round(fp32["accuracy"] * report["tradeoff"]["answers"]) >= FEW_RIGHT


def remark(name: str, profile: dict[str, Any]) -> str:
    """The metrics in which a profile is worse than all-INT8, in a sentence; empty if there are none."""
    titles = {"relative_error": "relative error", "top1_agreement": "top-1", "kl_divergence": "KL divergence"}
    parts = [
        "{} ({}, all-INT8 {})".format(titles.get(metric, metric), *apart(profile[metric], int8))
        for metric, int8 in profile.get("worse", {}).items()
    ]
    return f"{name} is worse than all-INT8 in {joined(parts)}." if parts else ""


def remarks(report: Report) -> list[str]:
    """The remarks on all profiles."""
    return list(filter(None, (remark(name, profile) for name, profile in report["profiles"]["profiles"].items())))


def costs(report: Report) -> list[str]:
    """The cost of INT8 and of the recommended profile, in sentences."""
    known = {state["state"]: state for state in states(report)}
    int8, best, fp32 = (known.get(name) for name in ("every op in INT8", "recommended", "every op in FP32"))
    if int8 is None:
        return without_tradeoff(report)
    found = []
    if best:
        size = f"The recommended profile has {megabytes(best['weight_bytes'])} of weights: "
        size += f"{best['weight_bytes'] / int8['weight_bytes']:.3g} times those of all-INT8"
        if fp32:
            size += f", {percent(best['weight_bytes'] / fp32['weight_bytes'])} of those of FP32"
        found.append(f"{size}. On held-out samples it has {sqnr(best['sqnr_db'])}.")
    return found + accuracy(report, int8, best, fp32)


def without_tradeoff(report: Report) -> list[str]:
    """The cost of INT8 on the calibration batches, where no held-out samples were measured."""
    all_int8 = report["all_int8"]
    found = ["The trade-off was not measured. The calibration batches show only the cost of INT8 itself."]
    top1 = all_int8["top1_agreement"]
    if top1 == 1:
        found.append(
            f"{int8_of(report)} costs nothing measurable in top-1 there: no position's most likely token changes."
        )
    elif top1 is not None:
        found.append(f"The most likely token is the same as in FP32 at {percent(top1)} of the positions.")
    return [*found, f"With every op in INT8 the output has {sqnr(all_int8['sqnr_db'])}."]


def accuracy(
    report: Report, int8: dict[str, Any], best: dict[str, Any] | None, fp32: dict[str, Any] | None
) -> list[str]:
    """The cost of INT8 in answers and in top-1, in sentences, or why the answers cannot show it."""
    found = []
    if fp32 and int8["accuracy"] is not None and fp32["accuracy"] is not None:
        found.append(of_answers(report, int8, best, fp32))
    if int8["top1_agreement"] == 1:
        found.append(
            f"{int8_of(report)} costs nothing measurable in top-1 here: no position's most likely token changes."
        )
    else:
        kept = f", with the recommended profile at {percent(best['top1_agreement'])}" if best else ""
        found.append(
            f"With every op in INT8 the most likely token is the same as in FP32 at"
            f" {percent(int8['top1_agreement'])} of the positions{kept}."
        )
    return found


def of_answers(report: Report, int8: dict[str, Any], best: dict[str, Any] | None, fp32: dict[str, Any]) -> str:
    """The cost of INT8 in answers, or why the answers do not show it."""
    answers = report["tradeoff"]["answers"]
    if not enough_right(report, fp32):
        by_fp32, by_int8 = (round(state["accuracy"] * answers) for state in (fp32, int8))
        return (
            f"FP32 itself gives {f'only {by_fp32}' if by_fp32 else 0} of {counted(answers, 'held-out answer')}"
            f" right, and INT8 {by_int8}. These are too few to judge INT8 by its accuracy."
        )
    right = f"{percent(int8['accuracy'])} of {answers} held-out answers are right with every op in INT8"
    if int8["accuracy"] < fp32["accuracy"]:
        kept = f", {percent(best['accuracy'])} with the recommended profile" if best else ""
        return f"{right}{kept}, {percent(fp32['accuracy'])} in FP32."
    same = int8["accuracy"] == fp32["accuracy"]
    than = "as many as in FP32" if same else f"more than the {percent(fp32['accuracy'])} in FP32"
    if damages(report, int8, fp32):
        return f"{right}, {than}. The answers do not show how much INT8 changes the output."
    gain = " The trade-off therefore shows the SQNR, which kept ops can still raise."
    left = "" if int8["sqnr_db"] is None else gain
    return f"{int8_of(report)} costs nothing measurable in accuracy here: {right}, {than}.{left}"


def certainty(report: Report) -> list[tuple[str, str]]:
    """How stable the ranking and the keep-lists are: each check with its result."""
    found = [*held_out(report), *against_chance(report["tradeoff"]), *refined(report["tradeoff"])]
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
    return found + between(report["stability"], ops, measured)


def held_out(report: Report) -> list[tuple[str, str]]:
    """How much worse INT8 is on samples that set no scale."""
    if report["tradeoff"]["status"] != "measured":
        return []
    seen, unseen = report["all_int8"]["sqnr_db"], report["tradeoff"]["curves"]["ranking"][0]
    lowest = unseen["sqnr_db_lowest"] if report["tradeoff"]["batches"] > 1 else None
    scored = "batches, each with its own scales" if len(report["batches"]) != 1 else "batch, with its own scales"
    text = f"With every op in INT8 the output has {sqnr(seen)} on the scored {scored}."
    text += f" On held-out samples it has {sqnr(unseen['sqnr_db'])}"
    return [("Held-out", f"{text}{'' if lowest is None else f' (the worst batch {lowest:.2f} dB)'}.")]


CONTROLS = {"random": "random ones", "inverse": "the ranking reversed", "weight_bytes": "the largest weights first"}


def against_chance(tradeoff: dict[str, Any]) -> list[tuple[str, str]]:
    """How much better the ranking is on held-out samples than other orders in which ops can be kept."""
    if tradeoff["status"] != "measured":
        return []
    gains = {CONTROLS[key]: value for key, value in tradeoff["gains_db"].items() if value is not None}
    if not gains:
        return []
    text = (
        f"On held-out samples, keep-lists along the ranking gain {signed(gains)}. This is the mean over lengths up to"
    )
    text += " half of the ops, in which each doubling of the length counts the same."
    for key, lengths in tradeoff["losses"].items():
        if lengths:
            mean = "the mean of " if key == "random" else ""
            text += f" They are worse than {mean}{CONTROLS[key]} with {', '.join(map(str, lengths))} kept ops."
    if worse := [name for name, value in gains.items() if round(value, 1) <= 0]:
        text += f" In this mean the ranking is not better than {' and '.join(worse)}."
    return [("Against chance", text)]


def signed(gains: dict[str, float]) -> str:
    """Gains over other orders, each with its sign."""
    return ", ".join(f"{fixed(value, '+.1f')} dB over {name}" for name, value in gains.items())


def refined(tradeoff: dict[str, Any]) -> list[tuple[str, str]]:
    """Whether keep-lists chosen op by op are better than the ranking."""
    if tradeoff["status"] != "measured" or tradeoff["greedy_gain_db"] is None:
        return []
    longest, gained = tradeoff["curves"]["greedy"][-1]["keep"], tradeoff["greedy_gain_db"]
    better = "better than" if round(gained, 2) > 0 else "not better than"
    text = f"Keep-lists of up to {counted(longest, 'op')}, chosen op by op on a calibration batch, are {better}"
    return [("Greedy refinement", f"{text} those along the ranking ({fixed(gained, '+.2f')} dB).")]


def refinement_helps(report: Report) -> bool:
    """Whether a keep-list of the greedy curve is better than the ranking's keep-list of the same length."""
    curves = report["tradeoff"]["curves"]
    pairs = zip(curves["ranking"], curves.get("greedy", []), strict=False)
    return any(greedy["relative_error"] < ranking["relative_error"] for ranking, greedy in pairs)


def between(stability: dict[str, Any], ops: int, measured: int) -> list[tuple[str, str]]:
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
        text = f"Squared error and KL divergence order the ops with a tau of {metric_tau}{over}."
        found.append(("Between metrics", text))
    if stability["additivity"] is not None and ops > 1:
        text = f"The errors of single ops add up to {stability['additivity']:.3g} times the error with every op in INT8"
        far = abs(stability["additivity"] - 1) > 0.2
        text += ". Errors cancel or add to each other, so keep-lists must be measured." if far else ": nearly a sum."
        found.append(("As a sum", text))
    ties = f"{stability['ties']} of {measured} ops share their value with another op, so their order means nothing."
    return [*found, ("Ties", ties if stability["ties"] else "None: every op has its own value.")]


def activations(plan: Mapping[str, Any]) -> str:
    """How many bits activations have and who chose them. `plan` is a plan or the `measurement` of a report."""
    bits = "7 bits of 8" if plan["reduce_range"] else "all 8 bits"
    by_inc = f"Intel Neural Compressor's choice on a CPU {'without' if plan['reduce_range'] else 'with'} VNNI"
    chosen = by_inc if plan["reduce_range_by"] == "inc" else "set by sensitivity.reduce_range"
    return f"Activations are quantized to {bits}: {chosen}."


def without_inc(inc_check: IncCheck) -> str:
    """Why Intel Neural Compressor could not measure the model, and who measured and audited instead."""
    return (
        f"Intel Neural Compressor cannot measure this model: {inc_check['reason']}. All scores come from the"
        " replay. The audit compares them with torch's own quantized modules."
    )


AUDITORS = {
    "inc": "Intel Neural Compressor's unmodified helpers",
    "torch": "torch's own quantized modules in the FP32 model",
}


def of_schemes(report: Report) -> str:
    """What the table of schemes shows."""
    return (
        "SQNR, KL divergence and top-1 are those of the model with all ops in the scheme that can have it. Ops are"
        " ranked by the KL divergence that each adds alone. Profiles and exports are decided by inc_int8."
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


def of_agreement(report: Report) -> str:
    """What the table of agreements shows."""
    return (
        "How far two schemes agree on which ops are sensitive. Kendall's tau of the KL divergences is 1 for the same"
        " order and 0 for chance. The last column counts the most sensitive ops that both share."
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
