// The page of a report: the budget, the table of all ops, and the panel of one op.
(() => {
  const { at, breakable, button, drawNear, inBytes, make, percent, read, shown, views, withTools } = ui;
  const data = read("data");
  const { maps, schemes, frontier, profiles, words } = data;
  const decides = frontier.status === "measured";
  const UNQUANTIZED = "unquantized";

  const inUnit = (value) => (shown(value) + " " + words.unit).trim();
  const places = words.position === "sample" ? "samples" : "positions";
  const ofKl = (row) =>
    row.measured ? shown(row.divergence) : "≈ " + shown(row.divergence, 2) + " ± " + shown(row.standard_error, 1);
  const ofSqnr = (row) => (!row.measured ? "–" : row.sqnr_db === null ? "no error" : row.sqnr_db.toFixed(2));

  // ---- One op: its numbers in each scheme, and its scheme in each profile.
  const unitOf = new Map();
  if (decides) frontier.units.forEach((unit, index) => unit.ops.forEach((name) => unitOf.set(name, index)));
  const given = (choice, name) => (unitOf.has(name) ? choice[unitOf.get(name)] : UNQUANTIZED);
  const rowsOf = Object.fromEntries(
    Object.entries(Object.keys(schemes).length ? schemes : { inc_int8: { ops: maps.isolated?.ops ?? [], refused: {} } }).map(
      ([name, found]) => [name, { refused: found.refused, ops: new Map(found.ops.map((row) => [row.op_name, row])) }],
    ),
  );
  // A row with one cell is a remark, which takes the width of all.
  const tableOf = (heads, rows) => {
    const rowWith = ([head, ...cells]) => {
      const width = cells.length === 1 && heads.length > 2 ? { colspan: heads.length - 1, class: "wrap" } : {};
      return make("tr", [make("th", head, { scope: "row" }), ...cells.map((cell) => make("td", cell, width))]);
    };
    const top = make("tr", heads.map((head) => make("th", head, { scope: "col" })));
    return make("table", [make("thead", top), make("tbody", rows.map(rowWith))]);
  };
  // Why a unit breaks: sentences, a bar for each side alone, small histograms, and the cures.
  const drawn = (tag, attributes, content = []) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...content);
    return element;
  };
  const histogramOf = (title, { low, high, counts }) => {
    const [wide, tall] = [8 * counts.length, 60];
    // By the logarithm: a single value far out must stay visible.
    const most = Math.log1p(Math.max(...counts, 1));
    const bars = counts.map((count, index) => {
      const height = (tall * Math.log1p(count)) / most;
      return drawn("rect", { x: 8 * index, y: tall - height, width: 7, height });
    });
    const name = title + ": counts on a logarithmic scale, from " + shown(low, 3) + " to " + shown(high, 3);
    const picture = drawn("svg", { viewBox: "0 0 " + wide + " " + tall, preserveAspectRatio: "none", role: "img", "aria-label": name }, bars);
    return make("figure", [picture, make("figcaption", title + ", " + shown(low, 3) + " to " + shown(high, 3))]);
  };
  const barsOf = (sides) => {
    const most = Math.max(...Object.values(sides));
    const titles = { whole: "whole unit", weight_alone: "weight alone", inputs_alone: "inputs alone" };
    return make("div", Object.entries(sides).map(([side, value]) => {
      const bar = make("span", [], { class: "bar", style: "width: " + (most > 0 ? (100 * value) / most : 0) + "%" });
      return make("div", [make("span", titles[side]), make("span", bar), make("span", inUnit(value), { class: "n" })]);
    }), { class: "sides" });
  };
  const whyOf = (name) =>
    data.why.filter((cause) => cause.ops.includes(name)).flatMap((cause) => [
      make("h3", "Why it breaks in " + cause.scheme),
      barsOf(cause.sides),
      make("ul", cause.sentences.map((sentence) => make("li", sentence))),
      make("div", [histogramOf("Inputs", cause.histograms.inputs), histogramOf("Weight", cause.histograms.weight)], { class: "histograms" }),
      make("h4", "What regains the loss"),
      make("ul", cause.cures.map((cure) => make("li", cure))),
    ]);
  let budgeted = null; // the choice of the slider
  const openOp = (name) => {
    const inSchemes = Object.entries(rowsOf).map(([scheme, found]) => {
      const row = found.ops.get(name);
      if (!row) return [scheme, found.refused[name] ?? "not measured"];
      const numbers = [ofKl(row), ofSqnr(row), row.measured ? percent(row.top1_agreement) : "–"];
      const parts = [shown(row.image_divergence), shown(row.text_divergence)];
      return [scheme, ...numbers, ...parts, row.measured ? "measured" : "estimated"];
    });
    const choices = [...Object.entries(profiles), ...(budgeted ? [["your budget", budgeted]] : [])];
    const unit = unitOf.has(name) ? frontier.units[unitOf.get(name)] : null;
    const shares = unit && unit.ops.length > 1 ? "Its " + unit.ops.length + " ops have one scheme." : "";
    const close = button("Close", () => at("op").close());
    at("op").replaceChildren(
      make("h2", make("code", name), { id: "op-name" }),
      make("p", "Tower: " + (data.towers[name] ?? "–") + ". " + (unit ? "Unit: " + unit.name + ". " + shares : "The op is part of no decision.")),
      make("h3", "The op alone in each scheme"),
      make("div", tableOf(["scheme", words.heading, "SQNR (dB)", "top-1", words.short + " at image", words.short + " at text", "by"], inSchemes), { class: "scroll", tabindex: "0" }),
    );
    if (choices.length > 0) {
      const rows = choices.map(([title, choice]) => [title, given(choice, name)]);
      at("op").append(make("h3", "Its scheme in each profile"), tableOf(["profile", "scheme"], rows));
    }
    at("op").append(...whyOf(name), close);
    at("op").showModal();
    close.focus();
  };
  at("op").addEventListener("click", (event) => event.target === at("op") && at("op").close());

  for (const opens of document.querySelectorAll("button[data-op]")) {
    opens.addEventListener("click", () => openOp(opens.dataset.op));
  }

  // ---- The budget: a choice for the bytes of the slider.
  const units = decides ? frontier.units : [];
  const weights = units.reduce((sum, unit) => sum + unit.weights, 0);
  const patterns = patternsOf(data.linears);
  const inNats = frontier.loss === "divergence";
  const uniform = decides ? frontier.controls.filter((point) => point.kind === "uniform") : [];
  const bitsOf = (bytes) => (8 * bytes) / weights;
  const fact = (name, text) => make("div", [make("dt", name), make("dd", text)]);
  const markBudget = () => {
    if (!views.frontier || !budgeted || !inNats) return;
    const point = { bits: bitsOf(totalOf(units, budgeted, "bytes")), kl: totalOf(units, budgeted, "loss") };
    views.frontier.data("chosen", point.kl > 0 ? [point] : []).runAsync();
  };
  const ofSize = (size) => {
    const all = size + frontier.other_bytes;
    const share = percent(all / frontier.points.at(-1).weight_bytes);
    return bitsOf(size).toFixed(2) + " bits a weight; all weights take " + inBytes(all) + ", " + share + " of those without quantization";
  };
  const ofLoss = ({ choice, above, more }) => {
    const loss = shown(totalOf(units, choice, "loss"));
    const error = Math.hypot(...units.map((unit, index) => unit.error[choice[index]] ?? 0));
    const text = loss + (error ? " ± " + shown(error, 1) : "");
    const bound = above ? ". The least possible sum is at most " + shown(above, 2) + " lower" : ", the least for these bytes";
    const least = more ? ", a larger sum than the least for these bytes" : bound;
    return (inNats ? words.divergence + " " + (text + " " + words.unit).trim() + " per " + words.position : "relative error " + text) + least;
  };
  const ofUnits = (choice) =>
    [...frontier.candidates, UNQUANTIZED]
      .map((scheme) => [scheme, choice.filter((name) => name === scheme).length])
      .filter(([, count]) => count > 0)
      .map(([scheme, count]) => count + (scheme === UNQUANTIZED ? " " : " in ") + scheme)
      .join(", ");
  const isOf = (choice) => (point) => point.schemes.every((scheme, index) => scheme === choice[index]);
  const ofNearest = (all, choice) => {
    const known = [...frontier.points, ...uniform];
    const far = (point) => Math.abs(point.weight_bytes - all);
    // A refined point is near no other choice: what the page chooses is not refined.
    const nearest = () => known.filter((point) => point.name !== "refined").reduce((best, point) => (far(point) < far(best) ? point : best));
    const near = known.find(isOf(choice)) ?? nearest();
    const named = near.kind === "uniform" ? " (" + near.name + " for all)" : near.name ? " (" + near.name + ")" : "";
    const parts = [
      near.bits.toFixed(2) + " bits a weight" + named + ", " + inBytes(near.weight_bytes) +
        ": " + words.divergence + " " + inUnit(near.divergence) + " (95 % interval " + shown(near.divergence_low) + " to " + shown(near.divergence_high) + ")",
      ...(words.choice ? ["the most likely " + words.choice + " stays the same at " + percent(near.top1_agreement) + " of the " + places] : []),
      ...(near.accuracy === null ? [] : [percent(near.accuracy) + " of the answers are right"]),
    ];
    return parts.join("; ");
  };
  const setBudget = (bytes) => showChoice(allocate(units, Math.floor(bytes)) ?? allocate(units, limits[0]));
  // A measured choice, such as a refined one, may have a larger sum than the best for its bytes.
  const showMeasured = (choice) => {
    const best = allocate(units, totalOf(units, choice, "bytes"));
    const more = totalOf(units, choice, "loss") > totalOf(units, best.choice, "loss") * (1 + 1e-9);
    showChoice({ choice, above: best.above, more });
  };
  const showChoice = (found) => {
    budgeted = found.choice;
    const size = totalOf(units, budgeted, "bytes");
    const all = size + frontier.other_bytes;
    at("budget-facts").replaceChildren(
      fact("Size", ofSize(size)),
      fact("Predicted", ofLoss(found)),
      fact("Units", ofUnits(budgeted)),
      fact("Nearest measured choice", ofNearest(all, budgeted)),
    );
    at("bits").value = at("bits-number").value = bitsOf(size).toFixed(2);
    at("bits").setAttribute("aria-valuetext", bitsOf(size).toFixed(2) + " bits a weight, " + inBytes(all));
    const rows = at("units").tBodies[0].rows;
    units.forEach((unit, index) => {
      const [, scheme, loss] = rows[index].cells;
      if (scheme.textContent === budgeted[index]) return;
      scheme.textContent = budgeted[index];
      loss.textContent = shown(unit.loss[budgeted[index]]);
    });
    at("recipe").textContent = recipe(frontier, budgeted, patterns) || "llm-compressor cannot hold INC's INT8. Use the files of a profile.";
    markBudget();
  };
  const limits = decides ? [Math.min, Math.max].map((pick) => units.reduce((sum, unit) => sum + pick(...Object.values(unit.bytes)), 0)) : [];
  if (decides) {
    for (const input of [at("bits"), at("bits-number")]) {
      Object.assign(input, { min: (Math.ceil(100 * bitsOf(limits[0])) / 100).toFixed(2), max: (Math.ceil(100 * bitsOf(limits[1])) / 100).toFixed(2), step: 0.01 });
    }
    at("bits").addEventListener("input", () => setBudget((at("bits").valueAsNumber * weights) / 8));
    at("bits-number").addEventListener("change", () => setBudget(((at("bits-number").valueAsNumber || 0) * weights) / 8));
    at("units").tBodies[0].append(
      ...units.map((unit) => make("tr", [make("td", make("code", breakable(unit.name)), { class: "wrap" }), make("td"), make("td", [], { class: "n" })])),
    );
    at("budget-profiles").append(...Object.entries(profiles).map(([name, choice]) => button(name, () => showMeasured(choice))));
    if (data.decided) showMeasured(profiles[data.decided]);
    else setBudget((limits[0] + limits[1]) / 2);
  }

  withTools();
  drawNear((name, view) => {
    view.addEventListener("click", (event, item) => {
      if (item?.datum?.op) openOp(item.datum.op);
      if (name !== "frontier" || !item?.datum?.bits) return;
      const refined = item.datum.choice === "refined" && frontier.points.find(({ name, bits }) => name === "refined" && bits === item.datum.bits);
      if (refined) showMeasured(refined.schemes);
      else setBudget((item.datum.bits * weights) / 8 + 0.5);
    });
    if (name === "frontier") markBudget();
  });

  // ---- The table of all ops.
  const measured = (key) => [maps, schemes].some((all) => Object.values(all).some((found) => found.ops.some((row) => row[key] !== null)));
  // A column without any value is left out: INC measures one sum, a text has no image, a running total has no rank.
  const optional = { rank: "rank", divergence: "divergence", top1_agreement: "top1_agreement" };
  Object.assign(optional, { image_relative_error: "image_relative_error", text_relative_error: "image_relative_error" });
  const columns = [
    ["rank", "rank"],
    ["op_name", "op_name"],
    ["op_type", "op_type"],
    ...(data.decided ? [["kept_as", "kept as"]] : []),
    ["mse_value", "mse_value"],
    ["relative_error", "relative error"],
    ["sqnr_db", "SQNR (dB)"],
    ["divergence", words.heading],
    ["top1_agreement", "top-1"],
    ["image_relative_error", "image error"],
    ["text_relative_error", "text error"],
  ].filter(([key]) => !(key in optional) || measured(optional[key]));
  const texts = new Set(["op_name", "op_type", "kept_as"]);
  const [head, body] = [at("ops").tHead.rows[0], at("ops").tBodies[0]];
  // Rows come with the most sensitive op first, and those of a map without ranks in the plan's order.
  const sorting = { key: "rank", sign: 1 };
  const valueOf = (row, key) => (key === "kept_as" ? given(profiles[data.decided], row.op_name) : row[key]);

  for (const [key, title] of columns) {
    const sorter = button(title, () => {
      const first = texts.has(key) || key === "rank" ? 1 : -1;
      sorting.sign = sorting.key === key ? -sorting.sign : first;
      sorting.key = key;
      show();
    });
    head.append(make("th", sorter, { scope: "col", "data-key": key, "data-title": title, class: texts.has(key) ? "" : "n" }));
  }

  const compare = (left, right) => {
    const [a, b] = [valueOf(left, sorting.key), valueOf(right, sorting.key)];
    if (a === null || b === null) return (a === null) - (b === null) || left.rank - right.rank;
    const order = a < b ? -1 : a > b ? 1 : 0;
    return sorting.sign * order || left.rank - right.rank;
  };

  const lines = new Map(); // of each row, made once
  const rowOf = (row) => {
    if (lines.has(row)) return lines.get(row);
    const line = make("tr");
    lines.set(row, line);
    for (const [key] of columns) {
      let text = texts.has(key) ? valueOf(row, key) : shown(row[key]);
      if (key === "rank" && row.tied) text += " =";
      if (key === "sqnr_db") text = ofSqnr(row);
      if (key === "divergence") text = ofKl(row);
      if (key === "mse_value" && row.mse_value_std !== null) text += " ± " + shown(row.mse_value_std, 2);
      const content = key === "op_name" ? make("button", make("code", text), { type: "button" }) : text;
      line.append(make("td", content, { class: texts.has(key) ? key : "n" }));
    }
    line.addEventListener("click", () => getSelection().isCollapsed && openOp(row.op_name));
    return line;
  };

  const show = () => {
    // The scheme inc_int8 is the map itself, in INC's order.
    const isolated = at("map").value === "isolated";
    const scheme = isolated ? at("scheme").value : "";
    at("scheme").disabled = !isolated || Object.keys(schemes).length === 0;
    const map = maps[at("map").value];
    const found = scheme && scheme !== "inc_int8" ? schemes[scheme].ops : map?.ops ?? [];
    const wanted = at("filter").value.toLowerCase().split(/\s+/);
    const [type, tower] = [at("type").value, at("tower").value];
    let count = 0;
    // All rows stay in the table, so that all of them are printed.
    body.replaceChildren(
      ...[...found].sort(compare).map((row) => {
        const line = rowOf(row);
        const name = row.op_name.toLowerCase();
        const fits = (type === "" || row.op_type === type) && (tower === "" || data.towers[row.op_name] === tower);
        line.hidden = !wanted.every((word) => name.includes(word)) || !fits;
        count += !line.hidden;
        return line;
      }),
    );
    for (const cell of head.cells) {
      const sorted = cell.dataset.key === sorting.key;
      cell.setAttribute("aria-sort", sorted ? (sorting.sign > 0 ? "ascending" : "descending") : "none");
    }
    at("count").textContent = count + " of " + found.length + " ops";
    const direction = map?.direction ?? "";
    at("direction").textContent = scheme && scheme !== "inc_int8" ? "Only this op is in " + scheme + ". The " + words.divergence + " ranks: the highest is the most sensitive." : direction;
  };

  const choices = (id, values) => at(id).append(...values.map((value) => make("option", value, { value })));
  choices("type", [...new Set(Object.values(maps).flatMap((map) => map.ops.map((row) => row.op_type)))].sort());
  choices("tower", [...new Set(Object.values(data.towers))].sort());
  choices("scheme", Object.keys(schemes).length ? Object.keys(schemes) : ["inc_int8"]);
  at("filter").addEventListener("input", show);
  for (const id of ["type", "tower"]) at(id).addEventListener("change", show);
  for (const id of ["map", "scheme"]) {
    at(id).addEventListener("change", () => {
      Object.assign(sorting, { key: "rank", sign: 1 });
      show();
    });
  }
  show();
})();
