// Sections: plots by chapter, claims, pipeline timelines, loss curves, notes.
function chapters(section, everyRow) {
  for (const [chapter, title] of Object.entries(data.chapters)) {
    const of = rows.filter((row) => String(row.chapter) === chapter);
    const figures = data.figures.filter((figure) => String(figure.chapter) === chapter);
    const judged = of.filter((row) => row.as_published === true || row.as_published === false);
    const measured = of.filter((row) => row.kind !== "catalogue" && !row.miniature).length;
    add(
      section,
      el("h3", { id: `chapter-${chapter}` }, `${chapter} ${title}`),
      el(
        "p",
        { class: "quiet small" },
        `${measured} measured on GPUs, ${of.filter((row) => row.status === "not run").length} not run here`,
        judged.length ? `, ${judged.filter((row) => row.as_published).length} of ${judged.length} as published` : "",
        ". ",
        el(
          "a",
          {
            href: "#rows",
            onclick: (event) => {
              event.preventDefault();
              everyRow.only(chapter);
            },
          },
          "Show its rows",
        ),
      ),
      figures.map((figure) =>
        el(
          "details",
          { open: true },
          el("summary", {}, figure.title),
          el(
            "div",
            { class: "charts" },
            figure.panels.map((panel) => sweepChart(figure, panel)),
          ),
          figure.notes.map((note) => el("p", { class: "quiet small" }, note)),
        ),
      ),
    );
  }
}

const VERDICTS = { holds: "good", fails: "bad" };
function claims(section) {
  const found = data.claims ?? [];
  if (!found.length) {
    add(section, el("p", { class: "quiet" }, "No claims were evaluated."));
    return;
  }
  const sources = data.claim_sources;
  const verdicts = data.verdicts.filter((verdict) => found.some((claim) => claim.sides.some((side) => side.verdict === verdict)));
  const body = el("tbody");
  const select = el(
    "select",
    { id: "verdict", onchange: () => draw() },
    el("option", { value: "" }, "all"),
    verdicts.map((verdict) => el("option", {}, verdict)),
  );
  function draw() {
    const kept = found.filter((claim) => !select.value || claim.sides.some((side) => side.verdict === select.value));
    body.replaceChildren(
      ...kept.map((claim) =>
        el(
          "tr",
          { "data-claim": claim.name },
          el("td", { class: "left top" }, String(claim.chapter)),
          el(
            "td",
            { class: "left wide first" },
            claim.says,
            el("div", { class: "quiet small" }, `${claim.formula} must be ${claim.must}`),
          ),
          claim.sides.map((side) => el("td", { class: "left wide" }, sideOf(claim, side))),
        ),
      ),
    );
  }
  add(
    section,
    el(
      "ul",
      {},
      sources.map(({ title, counted }) => el("li", {}, `${title}: ${counted}`)),
    ),
    el(
      "p",
      { class: "quiet small" },
      "±: twice the standard uncertainty. Undecided: the bound holds in a part of that range. Published numbers state no uncertainty.",
    ),
    el("div", { class: "controls" }, el("label", {}, "Verdict", select)),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Claims; scrolls sideways" },
      el(
        "table",
        { id: "every-claim", "aria-label": "Claims" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["", "claim", ...sources.map((source) => source.title)].map((title) => el("th", { scope: "col", class: "left" }, title)),
          ),
        ),
        body,
      ),
    ),
  );
  draw();
}

/** A claim on one source: verdict, value, the numbers that it follows from, and why it fails. */
function sideOf(claim, side) {
  const spread = side.spread ? ` ± ${rough.format(side.spread)}` : "";
  return [
    el("span", { class: `badge ${VERDICTS[side.verdict] ?? "quiet"}` }, side.verdict),
    side.value === null ? "" : ` ${short(side.value)}${spread}`,
    el(
      "div",
      { class: "quiet small" },
      side.numbers.length
        ? side.numbers
            .map((one) => `${one.quantity}[${one.of}] = ${short(one.value)}${one.unit === "1" ? "" : ` ${one.unit}`}`)
            .join(", ")
        : side.missing.join(", "),
    ),
    side.reason && el("div", { class: "small" }, `Because ${side.reason}`),
  ];
}

function timelines(section) {
  const place = el("div");
  const select = el(
    "select",
    { id: "timeline", onchange: () => place.replaceChildren(timeline(data.timelines[Number(select.value)])) },
    data.timelines.map((one, index) => el("option", { value: index }, one.title)),
  );
  add(
    section,
    el(
      "p",
      {},
      "When each stage computes which micro-batch, in the order of Megatron-LM's schedules. Communication takes no time here: idle time is the bubble.",
    ),
    el("div", { class: "controls" }, el("label", {}, "Pipeline", select)),
    place,
  );
  drawWhenNear(place, () => place.append(timeline(data.timelines[0])));
}

function timeline(one) {
  const [row, left, top] = [28, 56, 8];
  const width = Math.max(700, byId("timelines").clientWidth - 4, 32 * one.micro_batches * one.chunks);
  const toX = (time) => left + (time / one.end) * (width - left - 8);
  const bottom = top + row * one.spans.length;
  const picture = svg("svg", {
    class: "plot",
    width,
    height: bottom + 40,
    viewBox: `0 0 ${width} ${bottom + 40}`,
    role: "img",
    "aria-label": `${one.title}. ${one.caption}`,
  });
  one.spans.forEach((spans, stage) => {
    const y = top + stage * row;
    picture.append(
      svg("text", { x: left - 6, y: y + 16, "text-anchor": "end" }, `stage ${stage}`),
      svg("rect", { class: "idle", x: left, y, width: toX(one.end) - left, height: row - 5 }),
    );
    for (const [batch, chunk, backward, start, end] of spans) {
      const [x, size] = [toX(start), toX(end) - toX(start)];
      picture.append(
        svg(
          "g",
          { class: `c${backward}` },
          svg(
            "rect",
            { class: chunk % 2 ? "own late" : "own", x: x + 0.4, y, width: Math.max(size - 0.8, 0.5), height: row - 5 },
            svg(
              "title",
              {},
              `stage ${stage}, micro-batch ${batch + 1}${one.chunks > 1 ? `, chunk ${chunk + 1}` : ""}, ${backward ? "backward" : "forward"}: ${short(start)} to ${short(end)}`,
            ),
          ),
          size >= (batch > 8 ? 13 : 8) && svg("text", { class: "number", x: x + size / 2, y: y + 15 }, String(batch + 1)),
        ),
      );
    }
  });
  for (const tick of one.ticks)
    picture.append(svg("text", { x: toX(tick), y: bottom + 12, "text-anchor": "middle" }, short(tick)));
  picture.append(
    svg(
      "text",
      { x: (left + width) / 2, y: bottom + 32, "text-anchor": "middle" },
      one.axis_title,
    ),
  );
  const key = ({ words, kind, colour }) =>
    el(
      "span",
      { class: "key" },
      svg(
        "svg",
        { class: colour === null ? "" : `c${colour}`, width: 14, height: 12, "aria-hidden": "true" },
        svg("rect", { class: kind, width: 12, height: 12 }),
      ),
      ` ${words}`,
    );
  return el(
    "div",
    { class: "timeline" },
    el("p", { class: "small keys" }, one.keys.map(key)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Timeline; scrolls sideways" }, picture),
    el("p", { class: "small" }, one.caption),
  );
}

function losses(section) {
  const long = rows.filter((row) => row.curves?.loss && row.steps_done >= 100 && !row.miniature);
  const shown = long.length ? long : rows.filter((row) => row.curves?.loss);
  if (!shown.length) {
    add(section, el("p", { class: "quiet" }, "No run has a loss yet."));
    return;
  }
  const groups = grouped(shown, (row) => row.chapter);
  for (const [chapter, of] of groups) {
    for (let i = 0; i < of.length; i += MOST_RUNS) {
      add(
        section,
        el(
          "div",
          { class: "charts wide" },
          curveChart({
            title: `Training loss: ${data.chapters[chapter] ?? chapter}`,
            quantity: "loss",
            xTitle: "training step",
            unit: "",
            digits: 4,
            chosen: of.slice(i, i + MOST_RUNS),
          }),
        ),
      );
    }
  }
}

function notes(section) {
  const lines = [
    "ms/step: median over the averaging window; ±: half the interquartile range. GiB: used memory of the fullest GPU as nvidia-smi shows it, including CUDA context and NCCL.",
    "ratio: here / published; a published number in doubt has none. TFLOP/s: per GPU, " + data.flops + "; MFU: over the dense peak at the run's precision.",
    `Published: ${data.published}`,
    ...data.warnings.map((warning) => `Left out: ${warning}`),
  ];
  add(
    section,
    el(
      "ul",
      {},
      lines.map((line) => el("li", {}, line)),
    ),
  );
}
