"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // Expressions are interpreted and not compiled, so that the page needs no eval.
  const specs = read("specs");
  for (const [name, spec] of Object.entries(specs)) {
    vegaEmbed("#chart-" + name, spec, { actions: false, renderer: "svg", ast: true, tooltip: { theme: "report" } }).catch(
      (error) => {
        document.getElementById("chart-" + name).textContent = "This picture could not be drawn: " + error.message;
        console.error(error);
      },
    );
  }

  // Numbers far from 1 are shown as powers of ten.
  const shown = (value, digits = 4) => {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
    const size = Math.abs(value);
    return size < 1e-3 || size >= 1e6 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  };
  const maps = read("maps");
  const measured = (key) => Object.values(maps).some((map) => map.ops.some((row) => row[key] !== null));
  // A column without any value is left out: INC measures one sum, a text has no image, a running total has no rank.
  const optional = { rank: "rank", kl_divergence: "kl_divergence", top1_agreement: "top1_agreement" };
  Object.assign(optional, { image_relative_error: "image_relative_error", text_relative_error: "image_relative_error" });
  const columns = [
    ["rank", "rank"],
    ["op_name", "op_name"],
    ["op_type", "op_type"],
    ["mse_value", "mse_value"],
    ["relative_error", "relative error"],
    ["sqnr_db", "SQNR (dB)"],
    ["kl_divergence", "KL (nats)"],
    ["top1_agreement", "top-1"],
    ["image_relative_error", "image error"],
    ["text_relative_error", "text error"],
  ].filter(([key]) => !(key in optional) || measured(optional[key]));
  const texts = new Set(["op_name", "op_type"]);
  const table = document.getElementById("ops");
  const [head, body] = [table.tHead.rows[0], table.tBodies[0]];
  const control = (id) => document.getElementById(id);
  // Rows come with the most sensitive op first, and those of a map without ranks in the plan's order.
  const sorting = { key: "rank", sign: 1 };

  for (const [key, title] of columns) {
    const button = make("button", title, { type: "button" });
    button.addEventListener("click", () => {
      const first = texts.has(key) || key === "rank" ? 1 : -1;
      sorting.sign = sorting.key === key ? -sorting.sign : first;
      sorting.key = key;
      show();
    });
    const cell = make("th", undefined, { scope: "col", "data-key": key, "data-title": title, class: texts.has(key) ? "" : "n" });
    cell.append(button);
    head.append(cell);
  }

  const compare = (left, right) => {
    const [a, b] = [left[sorting.key], right[sorting.key]];
    if (a === null || b === null) return (a === null) - (b === null) || left.rank - right.rank;
    const order = a < b ? -1 : a > b ? 1 : 0;
    return sorting.sign * order || left.rank - right.rank;
  };

  const rowOf = (row) => {
    const line = make("tr");
    for (const [key] of columns) {
      let text = texts.has(key) ? row[key] : shown(row[key]);
      if (key === "rank" && row.tied) text += " =";
      if (key === "sqnr_db" && row.measured) text = row[key] === null ? "no error" : row[key].toFixed(2);
      if (key === "kl_divergence" && !row.measured) text = "≈ " + shown(row[key], 2) + " ± " + shown(row.standard_error, 1);
      if (key === "mse_value" && row.mse_value_std !== null) text += " ± " + shown(row.mse_value_std, 2);
      const cell = make("td", key === "op_name" ? undefined : text, { class: texts.has(key) ? key : "n" });
      if (key === "op_name") cell.append(make("code", text));
      line.append(cell);
    }
    return line;
  };

  const show = () => {
    const map = maps[control("map").value];
    const wanted = control("filter").value.toLowerCase().split(/\s+/);
    const type = control("type").value;
    const rows = [...map.ops].sort(compare);
    let count = 0;
    // All rows stay in the table, so that all of them are printed.
    body.replaceChildren(
      ...rows.map((row) => {
        const line = rowOf(row);
        const name = row.op_name.toLowerCase();
        line.hidden = !wanted.every((word) => name.includes(word)) || (type !== "" && row.op_type !== type);
        count += !line.hidden;
        return line;
      }),
    );
    for (const cell of head.cells) {
      const sorted = cell.dataset.key === sorting.key;
      cell.setAttribute("aria-sort", sorted ? (sorting.sign > 0 ? "ascending" : "descending") : "none");
    }
    control("count").textContent = count + " of " + map.ops.length + " ops";
    control("direction").textContent = map.direction;
  };

  const types = new Set(Object.values(maps).flatMap((map) => map.ops.map((row) => row.op_type)));
  for (const type of [...types].sort()) control("type").append(make("option", type, { value: type }));
  control("filter").addEventListener("input", show);
  control("type").addEventListener("change", show);
  control("map").addEventListener("change", () => {
    Object.assign(sorting, { key: "rank", sign: 1 });
    show();
  });
  show();
})();
