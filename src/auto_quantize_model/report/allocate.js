// The choice of a scheme for each unit within a budget of bytes, and llm-compressor's recipe of a choice.
// `decide/allocate.py` solves the same task by a solver. Here a choice takes milliseconds, so that a slider can move.

// At most so many partial choices are compared at a time. More occur only where losses follow bytes by a formula.
const PARTIAL = 2000;

// The sum of a cost, "bytes" or "loss", over the units in the schemes of a choice.
const totalOf = (units, choice, cost) => units.reduce((sum, unit, index) => sum + unit[cost][choice[index]], 0);

// In: units as the frontier of a report has them, and bytes. Out: {choice, above}: the scheme of each unit, with the
// least sum of losses that fits; null if nothing fits. `above` is 0, or how far the least sum may lie below this one.
//
// The best steps of all units are taken until one does not fit. The rate of that step prices a byte (Lagrange), and each
// option has an excess: its price above the best price in its unit. A choice loses more than a bound by the sum of its
// options' excesses, and by the price of the bytes that it leaves. The steps taken have no excess, so the best choice
// has at most the price of the bytes that they leave. All choices with an excess up to a 64th of that are compared. If
// none fits, the limit is doubled.
function allocate(units, budget, partial = PARTIAL) {
  const options = units.map((unit) =>
    Object.keys(unit.bytes)
      .map((scheme) => ({ scheme, bytes: unit.bytes[scheme], loss: unit.loss[scheme], excess: 0 }))
      .sort((one, other) => one.bytes - other.bytes || one.loss - other.loss),
  );
  const chosen = options.map((found) => found[0]);
  let [left, rate] = [chosen.reduce((rest, option) => rest - option.bytes, budget), 0];
  if (left < 0) return null;
  for (const step of steps(options)) {
    if (step.needed > left) {
      rate = step.rate;
      break;
    }
    left -= step.needed;
    chosen[step.index] = step.option;
  }
  const price = (option) => option.loss + rate * option.bytes;
  for (const found of options) {
    const best = Math.min(...found.map(price));
    for (const option of found) option.excess = price(option) - best;
  }
  const lossOf = (found) => found.reduce((sum, option) => sum + option.loss, 0);
  const [gap, loss] = [rate * left, lossOf(chosen)];
  let [best, proven] = [chosen, gap <= 1e-12 * loss]; // nothing that is rounding alone
  for (let limit = gap / 64; !proven && limit <= 4 * gap; limit *= 2) {
    const found = within(options, budget, rate, limit, partial);
    if (found.chosen && lossOf(found.chosen) < lossOf(best)) best = found.chosen;
    if (!found.all) break;
    proven = found.chosen !== null;
  }
  const above = proven ? 0 : Math.max(0, gap - (loss - lossOf(best)));
  return { choice: best.map((option) => option.scheme), above };
}

// The steps along the lower convex hull of each unit's losses over bytes, the largest gain of a byte first. Rounding
// never makes a step's rate higher than that of the step before it in its unit.
function steps(options) {
  const found = [];
  options.forEach((unit, index) => {
    let [from, before] = [unit[0], Infinity];
    const rate = (option) => (from.loss - option.loss) / (option.bytes - from.bytes);
    for (;;) {
      const better = unit.filter((option) => option.bytes > from.bytes && option.loss < from.loss);
      if (better.length === 0) return;
      const option = better.reduce((best, other) => (rate(other) > rate(best) ? other : best));
      before = Math.min(before, rate(option));
      found.push({ index, option, needed: option.bytes - from.bytes, rate: before });
      from = option;
    }
  });
  return found.sort((one, other) => other.rate - one.rate || one.index - other.index);
}

// The best choice within the budget of all whose excess is at most `limit`, or null; and whether all were compared.
// Unit after unit is added. Of two partial choices, the one with more bytes and no less loss is dropped.
function within(options, budget, rate, limit, partial) {
  const near = options.map((found) => found.filter((option) => option.excess <= limit));
  const ends = near.map((found) => [found[0].bytes, found.at(-1).bytes]); // options have growing bytes
  const span = (index) => ends[index][1] - ends[index][0];
  const order = [...near.keys()].sort((one, other) => span(other) - span(one));
  let [fewest, most] = [0, 1].map((end) => ends.reduce((sum, found) => sum + found[end], 0));
  let [states, all] = [[{ bytes: 0, loss: 0, excess: 0, option: null, from: null }], true];
  for (const index of order) {
    fewest -= ends[index][0];
    most -= ends[index][1];
    const next = [];
    for (const option of near[index]) {
      for (const from of states) {
        const bytes = from.bytes + option.bytes;
        const excess = from.excess + option.excess;
        const unused = Math.max(0, budget - bytes - most); // bytes that the other units cannot use
        if (bytes + fewest > budget || excess + rate * unused > limit) continue;
        next.push({ bytes, loss: from.loss + option.loss, excess, option, from });
      }
    }
    if (near[index].length > 1) next.sort((one, other) => one.bytes - other.bytes || one.loss - other.loss);
    let lowest = Infinity;
    states = next.filter((state) => state.loss < lowest && ((lowest = state.loss), true));
    const every = Math.ceil(states.length / partial);
    if (every > 1) [states, all] = [states.filter((state, place) => place % every === 0), false];
  }
  if (states.length === 0) return { chosen: null, all };
  const chosen = [];
  let state = states.at(-1);
  for (const index of order.reverse()) {
    chosen[index] = state.option;
    state = state.from;
  }
  return { chosen, all };
}

// In: the frontier with `fields` of each scheme, a choice, and the patterns of all Linears. Out: YAML; "" for INC's INT8.
function recipe(frontier, choice, patterns) {
  const groups = new Map();
  frontier.units.forEach((unit, index) => {
    const ops = groups.get(choice[index]) ?? [];
    groups.set(choice[index], [...ops, ...unit.ops]);
  });
  groups.delete("unquantized");
  if (groups.has("inc_int8")) return "";
  const quantized = new Set([...groups.values()].flat());
  const lines = ["quant_stage:", "  quant_modifiers:", "    QuantizationModifier:", "      config_groups:"];
  if (groups.size === 0) lines[3] += " {}";
  for (const [scheme, ops] of groups) {
    lines.push("        " + scalar(scheme) + ":", "          targets:");
    lines.push(...ops.map((name) => "          - " + scalar(patterns.get(name))));
    for (const [side, fields] of Object.entries(frontier.fields[scheme] ?? {})) {
      const stated = Object.entries(fields ?? {}).filter(([, value]) => value !== null);
      if (stated.length > 0) lines.push("          " + side + ":");
      lines.push(...stated.map(([key, value]) => "            " + key + ": " + scalar(value)));
    }
  }
  const ignored = [...patterns.keys()].filter((name) => !quantized.has(name));
  lines.push("      ignore:" + (ignored.length === 0 ? " []" : ""));
  lines.push(...ignored.map((name) => "      - " + scalar(patterns.get(name))));
  return lines.join("\n") + "\n";
}

// {name: its pattern}: the name under any of the prefixes of transformers, checkpoints and vLLM, and the whole name where
// that is ambiguous.
function patternsOf(names) {
  const all = names.map((name) => name + ".\n").join("");
  const escaped = (text) => text.replace(/[()[\]{}?*+\-|^$\\.&~# \t\n\r\v\f]/g, "\\$&");
  const pattern = (name) => {
    const common = name.replace(/^(model\.)?(language_model\.)?(model\.)?/, "");
    const unique = all.indexOf(common + ".") === all.lastIndexOf(common + ".");
    return unique ? "re:(.*\\.)?" + escaped(common) + "$" : "re:" + escaped(name) + "$";
  };
  return new Map(names.map((name) => [name, pattern(name)]));
}

// A value in YAML. JSON is YAML, and single quotes keep the backslashes of patterns readable.
function scalar(value) {
  if (typeof value !== "string") return JSON.stringify(value);
  if (/^[A-Za-z][\w.]*$/.test(value) && !/^(true|false|null|yes|no|on|off|y|n)$/i.test(value)) return value;
  return /[^\x20-\x7e]/.test(value) ? JSON.stringify(value) : "'" + value.replaceAll("'", "''") + "'";
}
