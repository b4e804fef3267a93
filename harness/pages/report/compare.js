// Two or more runs compared: curves of loss, step time and memory, numbers, and the settings that differ.
const MOST_RUNS = 6;

function compare(section) {
  const chosen = [];
  const boxes = new Map();
  const comparable = rows.filter((row) => row.curves);
  const chips = el("ul", { class: "chips", "aria-label": "Runs compared" });
  const result = el("div");
  const picker = el(
    "select",
    {
      id: "compare-add",
      onchange: () => {
        if (picker.value) toggle(rows[Number(picker.value)]);
      },
    },
    el("option", { value: "" }, "choose …"),
    comparable.map((row) =>
      el(
        "option",
        { value: row.index },
        `${row.kind === "record" ? `${nameOf(row)}: ${row.slug}` : nameOf(row)}, ${row.hardware}`,
      ),
    ),
  );
  const message = el("span", { class: "quiet", role: "status" });

  function toggle(row) {
    const there = chosen.indexOf(row);
    if (there >= 0) chosen.splice(there, 1);
    else if (chosen.length < MOST_RUNS) chosen.push(row);
    message.textContent = there < 0 && !chosen.includes(row) ? `At most ${MOST_RUNS} at once: remove one first.` : "";
    draw();
  }
  function box(row) {
    const made = el("input", {
      type: "checkbox",
      class: "check",
      "aria-label": `Compare ${row.label}`,
      onchange: () => toggle(row),
    });
    made.checked = chosen.includes(row);
    boxes.set(row, made);
    return made;
  }
  function draw() {
    boxes.forEach((made, row) => {
      made.checked = chosen.includes(row);
    });
    picker.value = "";
    chips.replaceChildren(
      ...chosen.map((row, i) =>
        el(
          "li",
          {},
          el(
            "button",
            { type: "button", "aria-label": `Remove ${nameOf(row)}`, onclick: () => toggle(row) },
            el("span", { class: `swatch c${i % 6}` }),
            nameOf(row),
            " ×",
          ),
        ),
      ),
    );
    result.replaceChildren(...(chosen.length ? comparison(chosen) : []));
  }

  add(
    section,
    el(
      "p",
      {},
      "Choose two or more runs here, or with the boxes of the table. Ratios are relative to the first.",
    ),
    el("div", { class: "controls" }, el("label", {}, "Add or remove a run", picker), message),
    chips,
    result,
  );
  const start = comparable.filter((row) => !row.miniature && row.status === "ok");
  (start.length > 1 ? start : comparable).slice(0, 2).forEach((row) => chosen.push(row));
  draw();
  return { box };
}

function comparison(chosen) {
  const seconds = chosen.filter((row) => row.curves.memory_gib).map((row) => row.curves.memory_gib.x.at(-1));
  const until = Math.max(...seconds);
  const peaks = chosen.map((row) =>
    row.curves.memory_gib || !row.memory_gib
      ? row
      : {
          ...row,
          label: `${nameOf(row)}: peak, not sampled`,
          kind: "run",
          curves: { memory_gib: { x: [0, until], y: [row.memory_gib, row.memory_gib] } },
        },
  );
  const charts = [
    curveChart({ title: "Loss", quantity: "loss", xTitle: "training step", unit: "", digits: 4, chosen }),
    curveChart({
      title: "Step time",
      quantity: "step_ms",
      xTitle: "training step",
      unit: "ms",
      digits: 1,
      chosen,
      fromZero: true,
    }),
    seconds.length
      ? curveChart({
          title: "Memory of the fullest GPU",
          quantity: "memory_gib",
          xTitle: "seconds since the start",
          unit: "GiB",
          digits: 1,
          chosen: peaks,
          fromZero: true,
        })
      : peakChart(chosen),
  ];
  const kinds = new Set(chosen.map((row) => row.hardware));
  return [
    kinds.size > 1 &&
      el("p", { class: "bad" }, `Different hardware: ${[...kinds].join(" and ")}. Times and memory do not compare.`),
    el("div", { class: "charts" }, charts),
    el(
      "p",
      { class: "quiet small" },
      "The scale of step time fits step 6 and later. Slower first steps are drawn at its upper edge; hovering shows their values. " +
        "Records keep only the peak of memory; runs of this machine also keep samples over time.",
    ),
    differences(chosen),
  ].filter(Boolean);
}

/** Peak memory of runs without samples over time. */
function peakChart(chosen) {
  const peaks = chosen.map((row, i) => ({ row, i })).filter(({ row }) => row.memory_gib);
  return chart({
    title: "Peak memory of the fullest GPU",
    yTitle: "memory, GiB",
    xTitle: "",
    ticks: peaks.map(({ i }) => `${i + 1}`),
    fromZero: true,
    legend: peaks.map(({ row, i }) => ({
      key: String(i),
      name: `${i + 1}: ${nameOf(row)}`,
      colour: `c${i % 6}`,
      marker: "here",
      dash: null,
    })),
    series: peaks.map(({ row, i }) => ({
      colour: `c${i % 6}`,
      marker: "here",
      keys: [String(i)],
      name: nameOf(row),
      points: [{ x: `${i + 1}`, y: row.memory_gib, text: () => `${number(row.memory_gib, 1)} GiB` }],
    })),
  });
}

function differences(chosen) {
  const [first] = chosen;
  const NUMBERS = [
    ["ms/step", "step_ms", milliseconds],
    ["GiB", "memory_gib", (v) => number(v, 1)],
    ["TFLOP/s", "tflops", (v) => number(v, 0)],
    ["MFU", "mfu", (v) => (v ? `${number(100 * v, 1)}%` : "")],
    ["tokens/s", "tokens_per_s", (v) => number(v, 0)],
    ["first loss", "loss_first", (v) => number(v, 4)],
    ["last loss", "loss_last", (v) => number(v, 4)],
    ["steps", "steps_done", (v) => number(v, 0)],
  ];
  const RATIOS = new Set(["step_ms", "memory_gib", "tflops", "mfu", "tokens_per_s"]);
  const SETTINGS = ["layout", "model", "gpus", "data", "precision", "hardware", "upstream", "status", "runs_on_node"];
  const ratio = (key, row) =>
    row !== first && row[key] && first[key] && RATIOS.has(key) ? ` (${number(row[key] / first[key], 2)}x)` : "";
  const line = (title, cells) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", class: "left" }, title),
      cells.map((cell) => el("td", {}, cell)),
    );
  const given = (row) =>
    Object.entries(row.overrides)
      .map(([key, value]) => `${key}=${value}`)
      .join(" ");
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Numbers compared; scrolls sideways" },
    el(
      "table",
      { id: "differences", "aria-label": "Numbers compared" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", { scope: "col", class: "left" }, ""),
          chosen.map((row, i) => el("th", { scope: "col" }, el("span", { class: `swatch c${i % 6}` }), ` ${nameOf(row)}`)),
        ),
      ),
      el(
        "tbody",
        {},
        NUMBERS.map(([title, key, text]) =>
          line(
            title,
            chosen.map((row) => text(row[key]) + ratio(key, row)),
          ),
        ),
        SETTINGS.filter((key) => new Set(chosen.map((row) => row[key])).size > 1).map((key) =>
          line(
            key.replaceAll("_", " "),
            chosen.map((row) => String(row[key] ?? "")),
          ),
        ),
        new Set(chosen.map(given)).size > 1 && line("changed", chosen.map(given)),
      ),
    ),
  );
}
