"""What a report says in sentences, in its Markdown and on its page alike. In: the report. Out: text without markup."""

from typing import Any

Report = dict[str, Any]


def number(value: float | None, unit: str = "") -> str:
    """Four significant digits and a unit, a dash for null."""
    return "–" if value is None else f"{value:.4g} {unit}".strip()


def percent(value: float | None) -> str:
    """A share as a percentage, a dash for null."""
    return "–" if value is None else f"{100 * value:.2f} %"


def megabytes(value: float) -> str:
    """Bytes as MB, or GB from 1000 MB on."""
    return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"


def sqnr(value: float | None) -> str:
    """An SQNR with its unit; null is an infinite one."""
    return "no error" if value is None else f"an SQNR of {value:.2f} dB"


def states(report: Report) -> list[dict[str, Any]]:
    """What was measured on held-out samples: all ops in INT8, the recommended profile, all ops in FP32 where known."""
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


def decision(report: Report) -> tuple[str, str]:
    """What to keep, in one sentence, and why that."""
    best = report["profiles"]["profiles"].get("recommended")
    if best is None:
        missed = report["profiles"]["missed"]
        return "No profile is recommended.", f"{missed[:1].upper()}{missed[1:]}."
    target = {name: value for name, value in report["profiles"]["target"].items() if value is not None}
    why = (
        "It has the least error of the measured keep-lists within the budget"
        if set(target) == {"max_weight_bytes"}
        else "They are the fewest of the measured keep-lists that reach the target"
    )
    why += f" ({', '.join(f'{name} {value:g}' for name, value in target.items())}), {ORDERS[best['order']]}."
    if best["keep"]:
        return f"Keep {best['keep']} of {report['tradeoff']['ops']} ops in FP32.", why
    return "Keep nothing: INT8 reaches the target as it is.", ""


def costs(report: Report) -> list[str]:
    """What INT8 and the recommended profile cost, in sentences."""
    known = {state["state"]: state for state in states(report)}
    int8, best, fp32 = (known.get(name) for name in ("every op in INT8", "recommended", "every op in FP32"))
    if int8 is None:
        return without_tradeoff(report["all_int8"])
    found = []
    if best:
        size = f"The recommended profile has {megabytes(best['weight_bytes'])} of weights: "
        size += f"{best['weight_bytes'] / int8['weight_bytes']:.3g} times those of all-INT8"
        if fp32:
            size += f", {percent(best['weight_bytes'] / fp32['weight_bytes'])} of those of FP32"
        found.append(f"{size}. On held-out samples it has {sqnr(best['sqnr_db'])}.")
    return found + accuracy(report, int8, best, fp32)


def without_tradeoff(all_int8: dict[str, Any]) -> list[str]:
    """What INT8 costs on the calibration batches, where no held-out samples were measured."""
    found = ["What keeping ops costs and buys was not measured; of INT8 itself, the calibration batches say this."]
    top1 = all_int8["top1_agreement"]
    if top1 == 1:
        found.append("INT8 costs nothing measurable in top-1 there: no position's most likely token changes.")
    elif top1 is not None:
        found.append(f"The most likely token is that of FP32 at {percent(top1)} of the positions.")
    return [*found, f"With every op in INT8 the output has {sqnr(all_int8['sqnr_db'])}."]


def accuracy(
    report: Report, int8: dict[str, Any], best: dict[str, Any] | None, fp32: dict[str, Any] | None
) -> list[str]:
    """What INT8 costs in answers and in top-1, in sentences, and whether either can be measured at all."""
    found = []
    answers = report["tradeoff"]["answers"]
    if fp32 and int8["accuracy"] is not None and fp32["accuracy"] is not None:
        right = f"{percent(int8['accuracy'])} of {answers} held-out answers are right with every op in INT8"
        if int8["accuracy"] >= fp32["accuracy"]:
            than = "as many as" if int8["accuracy"] == fp32["accuracy"] else f"{percent(fp32['accuracy'])}"
            found.append(
                f"INT8 costs nothing measurable in accuracy here: {right}, {than} in FP32. The trade-off therefore"
                " shows SQNR, in which there is something to gain."
            )
        else:
            kept = f", {percent(best['accuracy'])} with the recommended profile" if best else ""
            found.append(f"{right}{kept}, {percent(fp32['accuracy'])} in FP32.")
    if int8["top1_agreement"] == 1:
        found.append("INT8 costs nothing measurable in top-1 here: no position's most likely token changes.")
    else:
        kept = f", with the recommended profile at {percent(best['top1_agreement'])}" if best else ""
        found.append(
            f"The most likely token is that of FP32 at {percent(int8['top1_agreement'])} of the positions with every op"
            f" in INT8{kept}."
        )
    return found


def certainty(report: Report) -> list[tuple[str, str]]:
    """How far the ranking and the keep-lists can be trusted: what was looked at, and what it says."""
    found = [*held_out(report), *against_chance(report["tradeoff"]), *refined(report["tradeoff"])]
    if report["trust"] is None:
        return [*found, ("Ranking", "The isolated map was not measured, so there is none.")]
    return found + between(report["trust"])


def held_out(report: Report) -> list[tuple[str, str]]:
    """How much worse INT8 does on samples that no scale was set by."""
    if report["tradeoff"]["status"] != "measured":
        return []
    seen, unseen = report["all_int8"]["sqnr_db"], report["tradeoff"]["curves"]["ranking"][0]
    lowest = unseen["sqnr_db_lowest"]
    text = f"With every op in INT8 the output has {sqnr(seen)} on the scored batches, each with scales of its own, and"
    text += f" {sqnr(unseen['sqnr_db'])} on held-out ones"
    return [("Held-out", f"{text}{'' if lowest is None else f' (the worst batch {lowest:.2f} dB)'}.")]


CONTROLS = {"random": "random ones", "inverse": "the ranking reversed", "weight_bytes": "the largest weights first"}


def against_chance(tradeoff: dict[str, Any]) -> list[tuple[str, str]]:
    """What the ranking is worth on held-out samples, over other orders in which ops can be kept."""
    if tradeoff["status"] != "measured":
        return []
    gains = {CONTROLS[key]: value for key, value in tradeoff["gains_db"].items() if value is not None}
    if not gains:
        return []
    text = (
        f"Up to half of the ops, keep-lists along the ranking are worth {signed(gains)} on held-out samples (the area"
    )
    text += " between the curves, in which each doubling of a list counts the same)."
    for key, lengths in tradeoff["losses"].items():
        if lengths:
            mean = "the mean of " if key == "random" else ""
            text += f" They are worse than {mean}{CONTROLS[key]} at {', '.join(map(str, lengths))} kept."
    if worse := [name for name, value in gains.items() if value <= 0]:
        text += f" Against {' and '.join(worse)} the ranking does not earn its place here."
    return [("Against chance", text)]


def signed(gains: dict[str, float]) -> str:
    """Gains over other orders, each with its sign."""
    return ", ".join(f"{value:+.1f} dB over {name}" for name, value in gains.items())


def refined(tradeoff: dict[str, Any]) -> list[tuple[str, str]]:
    """Whether choosing op after op does better than the ranking."""
    if tradeoff["status"] != "measured" or tradeoff["greedy_gain_db"] is None:
        return []
    longest, gained = tradeoff["curves"]["greedy"][-1]["keep"], tradeoff["greedy_gain_db"]
    better = "better than" if gained > 0 else "no better than"
    text = (
        f"Chosen one after another on a calibration batch, keep-lists of up to {longest} ops are {better} those along"
    )
    return [("Greedy refinement", f"{text} the ranking ({gained:+.2f} dB).")]


def refinement_helps(report: Report) -> bool:
    """Whether some keep-list of the greedy curve does better than the ranking's of its length."""
    curves = report["tradeoff"]["curves"]
    pairs = zip(curves["ranking"], curves.get("greedy", []), strict=False)
    return any(greedy["relative_error"] < ranking["relative_error"] for ranking, greedy in pairs)


def between(trust: dict[str, Any]) -> list[tuple[str, str]]:
    """How far batches and metrics agree on the ranking, whether errors add up, and how many ops are tied."""
    found = []
    if trust["rank_tau"] is None:
        found.append(("Between batches", "Unknown, one batch was scored; raise sensitivity.confidence_batches."))
    else:
        text = f"{trust['batches']} batches agree on the order with a Kendall's tau of {trust['rank_tau']:.2f}"
        text += f" (lowest {trust['rank_tau_lowest']:.2f}; 1 is the same order, 0 is chance)."
        if trust["top_shared"] is not None:
            text += f" {trust['top_shared']} of the {trust['top']} most sensitive ops are the same in every batch."
        found.append(("Between batches", text))
    if trust["metric_tau"] is not None:
        text = f"Squared error and KL divergence order the ops with a tau of {trust['metric_tau']:.2f}."
        found.append(("Between metrics", text))
    if trust["additivity"] is not None:
        text = f"The errors of single ops add up to {trust['additivity']:.3g} times the error with every op in INT8"
        far = abs(trust["additivity"] - 1) > 0.2
        text += "; errors cancel or feed each other, so keep-lists have to be measured." if far else ": nearly a sum."
        found.append(("As a sum", text))
    ties = f"{trust['ties']} ops share their value with another; among them the order is the plan's."
    return [*found, ("Ties", ties if trust["ties"] else "None, every op has a value of its own.")]


def audited(audit: dict[str, Any]) -> str:
    """What was measured again, in a sentence."""
    ops, batch = len(audit["ops"]), audit["batch"]
    if audit["status"] == "bit_identical":
        return (
            f"{audit['compared']} values ({ops} ops, maps {', '.join(audit['maps'])}, batch {batch}) were measured"
            " again by Intel Neural Compressor's unmodified helpers: every one is the same, bit for bit."
        )
    if audit["status"] == "sites_bit_identical":
        agreement = ", ".join(f"{name} {number(value)}" for name, value in audit["rank_agreement"].items())
        return (
            f"The INT8 outputs of {ops} ops are the same on this device and on the CPU, bit for bit. Rank correlation"
            f" with Intel Neural Compressor on the CPU over these ops (batch {batch}): {agreement or 'not computed'}."
        )
    return "Not needed, Intel Neural Compressor itself measured every op."
