// The page of a comparison: its tables are sorted and filtered, and its picture is drawn.
(() => {
  const { at, button, drawNear, withTools } = ui;
  const valueOf = (row, index) => {
    const text = row.cells[index].dataset.value ?? row.cells[index].textContent;
    return text === "–" ? null : Number.isFinite(Number(text)) ? Number(text) : text;
  };
  const compare = (a, b) => (a === null || b === null ? (a === null) - (b === null) : a < b ? -1 : a > b ? 1 : 0);

  for (const table of document.querySelectorAll("table.sorted")) {
    const [heads, body] = [[...table.tHead.rows[0].cells], table.tBodies[0]];
    heads.forEach((head, index) => {
      const title = head.textContent;
      head.dataset.title = title;
      head.setAttribute("aria-sort", "none");
      const sort = () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        const rows = [...body.rows].map((row) => [valueOf(row, index), row]);
        // What has no value stands last both ways.
        const order = ([a], [b]) => (a === null || b === null ? 1 : sign) * compare(a, b);
        body.append(...rows.sort(order).map(([, row]) => row));
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      };
      head.replaceChildren(button(title, sort));
    });

    const controls = document.querySelector('.controls[data-for="' + table.id + '"]');
    const [filter, only, count] = ["filter", "only", "count"].map((name) => controls.querySelector("." + name));
    const show = () => {
      const wanted = filter.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) {
        const name = row.dataset.name.toLowerCase();
        row.hidden = !wanted.every((word) => name.includes(word)) || (only.value !== "" && row.dataset.only !== only.value);
      }
      count.textContent = [...body.rows].filter((row) => !row.hidden).length + " of " + body.rows.length;
    };
    filter.addEventListener("input", show);
    only.addEventListener("change", show);
    show();
  }
  withTools();
  drawNear();
})();
