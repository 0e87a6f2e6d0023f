// What the pages share: elements, numbers as text, copying and saving, and pictures.
const ui = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, content = [], attributes = {}) => {
    const element = document.createElement(tag);
    element.append(...[content].flat());
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // ---- Numbers as text. Those far from 1 are shown as powers of ten.
  const shown = (value, digits = 4) => {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
    const size = Math.abs(value);
    return size < 1e-3 || size >= 1e6 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  };
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(2) + " %");
  const inBytes = (value) => {
    const rounded = Number(value.toPrecision(4));
    const [unit, size] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["bytes", 1]].find(([, least]) => rounded >= least || least === 1);
    return Number((value / size).toPrecision(4)) + " " + unit;
  };
  const breakable = (name) => name.split(/(?<=\.)/).flatMap((part) => [part, make("wbr")]);

  // ---- Copying and saving. A page that lies on a disk may have no clipboard; then the text is selected and copied.
  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) {
      try {
        return await navigator.clipboard.writeText(text);
      } catch (error) {
        if (error.name !== "NotAllowedError") throw error;
      }
    }
    const area = make("textarea", [], { readonly: "" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };
  const save = (name, text, type) => {
    const link = make("a", [], { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const button = (title, act) => {
    const found = make("button", title, { type: "button" });
    found.addEventListener("click", act);
    return found;
  };
  const tools = (copied, saved, name, title) => {
    const copies = button("Copy", async () => {
      await copy(copied());
      copies.textContent = "Copied";
      setTimeout(() => (copies.textContent = "Copy"), 1500);
    });
    return make("div", [copies, button(title, () => save(name, saved(), "text/plain"))], { class: "tools" });
  };

  // A spreadsheet computes a text that begins like a formula, so such a text gets a quote; a number does not.
  const cellOf = (cell) => {
    const text = (cell.dataset.title ?? cell.textContent).trim();
    return /^[=+\-@\uff1d\uff0b\uff0d\uff20\t\r]/.test(text) && !Number.isFinite(Number(text)) ? "'" + text : text;
  };
  const cellsOf = (table) => [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].map(cellOf));
  const csv = (table) => cellsOf(table).map((row) => row.map((cell) => '"' + cell.replaceAll('"', '""') + '"').join(",") + "\r\n").join("");
  const tabbed = (table) => cellsOf(table).map((row) => row.map((cell) => cell.replaceAll(/\s/g, " ")).join("\t") + "\n").join("");
  const fileName = (text, suffix) => text.toLowerCase().replace(/[^\w.]+/g, "_") + suffix;
  // Buttons that copy and save, before each table in a region and each text of a file.
  const withTools = () => {
    for (const region of document.querySelectorAll(".scroll:has(> table), #ops-scroll")) {
      const table = region.querySelector("table");
      region.before(tools(() => tabbed(table), () => csv(table), fileName(region.getAttribute("aria-label"), ".csv"), "CSV"));
    }
    for (const text of document.querySelectorAll("pre[data-file]")) {
      text.before(tools(() => text.textContent, () => text.textContent, text.dataset.file, "Save"));
    }
  };

  // ---- Pictures. Expressions are interpreted and not compiled, so that the page needs no eval.
  // The colours of `figures.py` and those of a dark screen.
  const DARK = new Map([
    ["#FFFFFF", "#14171B"], ["#1B1B1B", "#E8E8E8"], ["#555555", "#B4B9BF"], ["#8A8A8A", "#7D858E"], ["#E6E6E6", "#2E343B"],
    ["#BDBDBD", "#4A525A"], ["#0072B2", "#56B4E9"], ["#D55E00", "#F0883E"], ["#009E73", "#2FC79A"], ["#5F5F5F", "#A6ADB5"],
  ]);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = {};
  const specs = read("specs");
  const draw = async (name, drawn) => {
    if (!window.vegaEmbed) document.head.append(make("script", at("bundle").textContent));
    const inDark = (key, value) => DARK.get(value) ?? value;
    const spec = JSON.parse(JSON.stringify(specs[name]), dark.matches ? inDark : null);
    if (spec.columns && innerWidth < 700) {
      // On a narrow screen the panels stand below each other.
      Object.assign(spec, { columns: 1 });
      Object.assign(spec.spec, { width: 190 });
      Object.assign(spec.spec.encoding.y.axis, { labelLimit: 130, minExtent: 130 });
    }
    try {
      const options = { actions: false, renderer: "svg", ast: true, tooltip: { theme: "report" } };
      const { view } = await vegaEmbed("#chart-" + name, spec, options);
      views[name] = view;
      drawn(name, view);
    } catch (error) {
      at("chart-" + name).textContent = "This picture could not be drawn: " + error.message;
      console.error(error);
    }
  };
  // A picture is drawn when it comes near the view, and the library of pictures runs for the first of them. So the page
  // answers before. One picture after another is drawn, and the page answers between two.
  // `drawn` gets the name and the view of each.
  const drawNear = (drawn = () => {}) => {
    let queue = Promise.resolve();
    const waiting = new Set(Object.keys(specs));
    const near = new IntersectionObserver(
      (entries) => {
        for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
          const name = target.id.replace("chart-", "");
          near.unobserve(target);
          if (waiting.delete(name)) queue = queue.then(() => draw(name, drawn)).then(() => new Promise((resolve) => setTimeout(resolve)));
        }
      },
      { rootMargin: "400px" },
    );
    for (const name of waiting) near.observe(at("chart-" + name));
    addEventListener("beforeprint", () => {
      for (const name of waiting) draw(name, drawn);
      waiting.clear();
    });
    dark.addEventListener("change", async () => {
      for (const name of Object.keys(views)) await draw(name, drawn);
    });
  };

  return { at, breakable, button, drawNear, inBytes, make, percent, read, shown, views, withTools };
})();
