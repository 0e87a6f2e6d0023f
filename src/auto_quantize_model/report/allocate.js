"use strict";
// The choice of a scheme for each unit within a budget of bytes, and llm-compressor's recipe of a choice.
// `decide/allocate.py` solves the same task by a solver. Here a choice takes milliseconds, so that a slider can move.

// The sum of a cost, "bytes" or "loss", over the units in the schemes of a choice.
const totalOf = (units, choice, cost) => units.reduce((sum, unit, index) => sum + unit[cost][choice[index]], 0);

// In: units as the frontier of a report has them, and bytes. Out: the scheme of each unit; null if nothing fits.
// The best steps of all units are taken until the next does not fit, and exchanges then spend the rest. The best of
// several starts is kept; each start takes one step less than the one before.
function allocate(units, budget, starts = Math.max(2, Math.ceil(400 / units.length))) {
  const options = units.map((unit) =>
    Object.keys(unit.bytes)
      .map((scheme) => ({ scheme, bytes: unit.bytes[scheme], loss: unit.loss[scheme] }))
      .sort((one, other) => one.bytes - other.bytes || one.loss - other.loss),
  );
  const fewest = options.reduce((sum, found) => sum + found[0].bytes, 0);
  if (budget < fewest) return null;
  const fitting = [];
  let left = budget - fewest;
  for (const step of steps(options)) {
    left -= step.needed;
    if (left < 0) break;
    fitting.push(step);
  }
  let [best, least] = [null, Infinity];
  for (let fewer = 0; fewer < starts && fewer <= fitting.length; fewer++) {
    const chosen = options.map((found) => found[0]);
    for (const { index, option } of fitting.slice(0, fitting.length - fewer)) chosen[index] = option;
    const found = improved(options, chosen, budget);
    const loss = found.reduce((sum, option) => sum + option.loss, 0);
    if (loss < least) [best, least] = [found, loss];
  }
  return best.map((option) => option.scheme);
}

// The steps along the lower convex hull of each unit's losses over bytes, the largest gain of a byte first.
function steps(options) {
  const found = [];
  options.forEach((unit, index) => {
    let from = unit[0];
    const rate = (option) => (from.loss - option.loss) / (option.bytes - from.bytes);
    for (;;) {
      const better = unit.filter((option) => option.bytes > from.bytes && option.loss < from.loss);
      if (better.length === 0) return;
      const option = better.reduce((best, other) => (rate(other) > rate(best) ? other : best));
      found.push({ index, option, needed: option.bytes - from.bytes, rate: rate(option) });
      from = option;
    }
  });
  return found.sort((one, other) => other.rate - one.rate || one.index - other.index);
}

// A choice after all exchanges that lower its loss.
function improved(options, chosen, budget) {
  for (;;) {
    const left = budget - chosen.reduce((sum, option) => sum + option.bytes, 0);
    const changes = exchange(options, chosen, left);
    if (changes === null) return chosen;
    for (const [index, option] of changes) chosen[index] = option;
  }
}

// The changes of one or two units that lower the loss most and fit into the bytes that are left; null without any.
function exchange(options, chosen, left) {
  const moves = options.flatMap((unit, index) =>
    unit
      .filter((option) => option !== chosen[index])
      .map((option) => [index, option, option.bytes - chosen[index].bytes, option.loss - chosen[index].loss]),
  );
  const smaller = moves.filter(([, , bytes]) => bytes < 0);
  let [best, gain] = [null, -1e-15]; // nothing that is rounding alone
  for (const one of moves.filter(([, , , loss]) => loss < 0)) {
    if (one[2] <= left) {
      if (one[3] < gain) [best, gain] = [[one], one[3]];
      continue;
    }
    for (const other of smaller) {
      const fits = one[2] + other[2] <= left && other[0] !== one[0];
      if (fits && one[3] + other[3] < gain) [best, gain] = [[one, other], one[3] + other[3]];
    }
  }
  return best && best.map(([index, option]) => [index, option]);
}

// In: the frontier with `fields` of each scheme, a choice, and the names of all Linears. Out: YAML; "" for INC's INT8.
function recipe(frontier, choice, linears) {
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
    lines.push(...ops.map((name) => "          - " + scalar(pattern(name, linears))));
    for (const [side, fields] of Object.entries(frontier.fields[scheme] ?? {})) {
      const stated = Object.entries(fields ?? {}).filter(([, value]) => value !== null);
      if (stated.length > 0) lines.push("          " + side + ":");
      lines.push(...stated.map(([key, value]) => "            " + key + ": " + scalar(value)));
    }
  }
  const ignored = linears.filter((name) => !quantized.has(name));
  lines.push("      ignore:" + (ignored.length === 0 ? " []" : ""));
  lines.push(...ignored.map((name) => "      - " + scalar(pattern(name, linears))));
  return lines.join("\n") + "\n";
}

// A name under any of the prefixes of transformers, checkpoints and vLLM; the whole name where that is ambiguous.
function pattern(name, names) {
  const common = name.replace(/^(model\.)?(language_model\.)?(model\.)?/, "");
  const unique = names.every((other) => other === name || !(other + ".").includes(common + "."));
  const escaped = (text) => text.replace(/[()[\]{}?*+\-|^$\\.&~# \t\n\r\v\f]/g, "\\$&");
  return unique ? "re:(.*\\.)?" + escaped(common) + "$" : "re:" + escaped(name) + "$";
}

// A value in YAML. JSON is YAML, and single quotes keep the backslashes of patterns readable.
function scalar(value) {
  if (typeof value !== "string") return JSON.stringify(value);
  if (/^[A-Za-z][\w.]*$/.test(value) && !/^(true|false|null|yes|no|on|off|y|n)$/i.test(value)) return value;
  return /[^\x20-\x7e]/.test(value) ? JSON.stringify(value) : "'" + value.replaceAll("'", "''") + "'";
}
