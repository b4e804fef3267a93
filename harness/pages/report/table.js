// The table of all rows: sorted by a column's button and filtered. Each row has its commands, and a box that adds it to the comparison.
const ratioText = (value) => number(value, 2);
const COLUMNS = [
  { key: "id", title: "id", left: true },
  {
    key: "name",
    title: "experiment",
    left: true,
    wrap: true,
  },
  { key: "status", title: "status", left: true, text: (row) => row.status_text },
  { key: "gpus", title: "GPUs" },
  { key: "layout", title: "layout", left: true, wrap: true },
  { key: "memory_gib", title: "GiB", text: (row) => number(row.memory_gib, 1), hint: "used memory of the fullest GPU" },
  {
    key: "published_memory_gib",
    title: "publ. GiB",
    text: (row) => row.published_memory_text ?? "",
  },
  { key: "memory_ratio", title: "ratio", text: (row) => ratioText(row.memory_ratio), hint: "memory here / published" },
  { key: "step_ms", title: "ms/step", text: (row) => milliseconds(row.step_ms), hint: "median over the averaging window" },
  { key: "step_ms_half_iqr", title: "±", text: (row) => milliseconds(row.step_ms_half_iqr), hint: "half the interquartile range" },
  { key: "published_step_ms", title: "publ. ms", text: (row) => row.published_step_text ?? "" },
  { key: "step_ratio", title: "ratio", text: (row) => ratioText(row.step_ratio), hint: "step time here / published" },
  {
    key: "predicted_step_ms",
    title: "formula",
    text: (row) => milliseconds(row.predicted_step_ms),
    hint: "predicted ms/step: on the row's GPU, or, where it was not run, on the published GPU",
  },
  { key: "tflops", title: "TFLOP/s", text: (row) => number(row.tflops, 0), hint: "model TFLOP/s of one GPU" },
  { key: "mfu", title: "MFU", text: (row) => (row.mfu ? `${number(100 * row.mfu, 1)}%` : "") },
  { key: "loss_last", title: "loss", text: (row) => number(row.loss_last, 3), hint: "training loss of the last step" },
  { key: "hardware", title: "hardware", left: true },
  { key: "runs_on_node", title: "shared", hint: "runs on the node at the same time, this one included" },
];
const textOf = (column, row) => (column.text ? column.text(row) : (row[column.key] ?? "")).toString();
const CHOICES = [
  { key: "chapter", title: "Chapter", name: (value) => `${value} ${data.chapters[value] ?? ""}` },
  { key: "gpus", title: "GPUs", name: (value) => String(value) },
  { key: "hardware", title: "Hardware", name: (value) => value },
  { key: "status", title: "Status", name: (value) => value },
];

function table(section, comparison) {
  const filters = { text: "" };
  const sorted = { column: null, down: false };
  const body = el("tbody");
  const count = el("span", { role: "status", "aria-live": "polite", class: "quiet", id: "count" });
  const search = el("input", {
    type: "search",
    id: "filter",
    placeholder: "zero2 tp4 …",
    autocomplete: "off",
    oninput: () => {
      filters.text = search.value.toLowerCase();
      draw();
    },
  });
  const selects = CHOICES.map(({ key, title, name }) => {
    const values = [...new Set(rows.map((row) => row[key]).filter((value) => value !== null && value !== undefined))];
    values.sort((a, b) => (typeof a === "number" ? a - b : a < b ? -1 : 1));
    const select = el(
      "select",
      {
        id: `filter-${key}`,
        onchange: () => {
          filters[key] = select.value;
          draw();
        },
      },
      el("option", { value: "" }, "all"),
      values.map((value) => el("option", { value: String(value) }, name(value))),
    );
    return el("label", {}, title, select);
  });
  const heads = COLUMNS.map((column) =>
    el(
      "th",
      { scope: "col", "aria-sort": "none", class: column.left && "left" },
      el(
        "button",
        {
          type: "button",
          title: column.hint,
          onclick: () => {
            sorted.down = sorted.column === column ? !sorted.down : false;
            sorted.column = column;
            heads.forEach((head, i) =>
              head.setAttribute("aria-sort", COLUMNS[i] === column ? (sorted.down ? "descending" : "ascending") : "none"),
            );
            draw();
          },
        },
        column.title,
      ),
    ),
  );
  const lineOf = new Map(rows.map((row) => [row, tableLine(row, comparison)]));
  const words = new Map(
    rows.map((row) => [
      row,
      [...COLUMNS.map((column) => textOf(column, row)), row.label, row.model, row.shows, row.notes, row.kind]
        .join(" ")
        .toLowerCase(),
    ]),
  );

  function matches(row) {
    return (
      filters.text.split(/\s+/).every((word) => words.get(row).includes(word)) &&
      CHOICES.every(({ key }) => !filters[key] || String(row[key]) === filters[key])
    );
  }
  function draw() {
    const kept = rows.filter(matches);
    if (sorted.column) {
      const { key } = sorted.column;
      const missing = (row) => row[key] === null || row[key] === undefined || row[key] === "";
      kept.sort((a, b) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b) || a.index - b.index;
        const order =
          typeof a[key] === "number"
            ? a[key] - b[key]
            : String(a[key]).localeCompare(String(b[key]), "en", { numeric: true });
        return (sorted.down ? -order : order) || a.index - b.index;
      });
    }
    body.replaceChildren(...kept.flatMap((row) => lineOf.get(row)()));
    count.textContent = `${kept.length} of ${rows.length} rows`;
  }

  add(
    section,
    el(
      "p",
      { class: "quiet small" },
      `Published: ${data.published} An experiment that was not run here shows its published numbers only. ` +
        "A miniature or a run with changed work has no ratio; a number with ? is in doubt.",
    ),
    el("div", { class: "controls" }, el("label", {}, "Text", search), selects, count),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Every row; scrolls sideways" },
      el(
        "table",
        { id: "every-row", "aria-label": "Every row" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col", class: "left act", "aria-label": "compare" }, "+"),
            heads.slice(0, 2),
            el("th", { scope: "col", class: "left" }, "command"),
            heads.slice(2),
          ),
        ),
        body,
      ),
    ),
  );
  draw();
  return {
    only(chapter) {
      const select = byId("filter-chapter");
      select.value = filters.chapter = String(chapter);
      draw();
      section.scrollIntoView();
    },
  };
}

function classOf(column, row) {
  const verdict = column.key === "status" ? { true: "good", false: "bad" }[row.as_published] : null;
  return [column.left && "left", column.wrap && "wrap", verdict].filter(Boolean).join(" ") || null;
}

/** A function that returns the lines of one row: the row itself and, once opened, its details. */
function tableLine(row, comparison) {
  let line = null;
  let detail = null;
  const open = (event) => {
    const button = event.currentTarget;
    const opened = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!opened));
    if (opened) {
      detail.remove();
      detail = null;
    } else {
      detail = details(row);
      line.after(detail);
    }
  };
  return () => {
    if (!line) {
      const cells = COLUMNS.map((column) => el("td", { class: classOf(column, row) }, textOf(column, row)));
      const opener = el(
        "button",
        {
          type: "button",
          class: "opener",
          "aria-expanded": "false",
          "aria-label": `Commands of ${row.label}`,
          onclick: open,
        },
        row.make,
      );
      line = el(
        "tr",
        { "data-id": row.id, "data-label": row.label },
        el("td", { class: "left act" }, row.curves && comparison.box(row)),
        cells.slice(0, 2),
        el("td", { class: "left" }, opener),
        cells.slice(2),
      );
    }
    return detail ? [line, detail] : [line];
  };
}

function details(row) {
  const changed = Object.entries(row.overrides)
    .map(([key, value]) => `${key}=${value}`)
    .join(" ");
  const window = row.window_first_step && row.step_ms ? `steps ${row.window_first_step} to ${row.window_last_step}` : "";
  const facts = [nameOf(row), row.model, row.precision, `data ${row.data}`, changed, window, row.upstream]
    .filter(Boolean)
    .join(" · ");
  return el(
    "tr",
    { class: "detail" },
    el(
      "td",
      { colspan: COLUMNS.length + 2 },
      el(
        "div",
        { class: "detail-box" },
        el("p", {}, row.shows),
        el("p", { class: "quiet small" }, facts),
        row.notes && el("p", { class: "quiet small" }, row.notes),
        command(`make command of ${row.label}`, row.make),
        command(`torchrun command of ${row.label}`, torchrunOf(row)),
      ),
    ),
  );
}
