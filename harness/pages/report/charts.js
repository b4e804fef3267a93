// Charts: lines over evenly spaced ticks (sweeps) or over a scale (curves). Hover and arrow keys read values, the legend hides lines.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "1 2", "5 2"];
const SOURCES = { published: "published", reference: "measured separately", half: "half size", here: "here" }; // in the order of drawing
const LINES = { published: "5 4", half: "8 3 2 3", here: "" };
const ASIDE = { here: -8, half: 0, published: 8, reference: 8 }; // horizontal shift in pixels of markers that share a tick
const SEVERAL_VERSIONS = new Set(rows.filter((row) => !row.miniature && row.upstream).map((row) => row.upstream)).size > 1;

/** Multiples of one of Python's tick sizes, from at or below low to at or above high, for ranges that the reader chooses. */
function ticksOf(low, high, most) {
  const size = data.tick_sizes.find((one) => one * most >= (high - low || 1) * 0.9999) ?? (high - low || 1);
  const first = Math.floor(low / size + 1e-9);
  const last = Math.max(Math.ceil(high / size - 1e-9), first + 1);
  return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * size).toPrecision(12));
}

function marker(kind, x, y) {
  if (kind === "none") return null;
  if (kind === "half") return svg("rect", { class: "full", x: x - 4, y: y - 4, width: 8, height: 8 });
  if (kind === "reference") return svg("path", { class: "hollow", d: `M${x} ${y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z` });
  return svg("circle", { class: kind === "published" ? "hollow" : "full", cx: x, cy: y, r: kind === "published" ? 4.5 : 4 });
}

/**
 * chart({title, yTitle, xTitle, ticks, yTicks, fromZero, most, series, legend}): a figure. Without yTicks the scale fits what is shown.
 * series: [{colour, marker, dash, join, aside, keys, name, points: [{x, y, text()}]}]; y null is out of memory; x is a tick or a number.
 * legend: [{key, name, colour, marker, dash}]; a key switched off hides the series that have it.
 */
function chart(options) {
  const off = new Set();
  const tip = el("div", { class: "tip", role: "status", "aria-live": "polite" });
  const plot = svg("svg", {
    class: "plot",
    tabindex: 0,
    role: "img",
    "aria-label": `${options.title}. Arrow keys read its values.`,
  });
  const legend = el(
    "div",
    { class: "legend" },
    options.legend.map((entry) => {
      const button = el(
        "button",
        {
          type: "button",
          "aria-pressed": "true",
          onclick: () => {
            if (!off.delete(entry.key)) off.add(entry.key);
            button.setAttribute("aria-pressed", String(!off.has(entry.key)));
            draw();
          },
        },
        svg(
          "svg",
          { class: entry.colour, viewBox: "0 0 30 12", "aria-hidden": "true" },
          entry.dash !== null && svg("path", { class: "join", d: "M1 6H29", "stroke-dasharray": entry.dash || null }),
          entry.marker && marker(entry.marker, 15, 6),
        ),
        entry.name,
      );
      return button;
    }),
  );
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, options.title), legend, plot, tip);
  let spots = [];
  let at = -1;

  function draw() {
    const width = plot.clientWidth || 360;
    const height = plot.clientHeight || 250;
    const shown = options.series.filter((series) => !series.keys.some((key) => off.has(key)));
    const values = shown.flatMap((series) => series.points.map((point) => point.y)).filter((y) => y !== null);
    const failed = shown.some((series) => series.points.some((point) => point.y === null));
    const highest = Math.min(Math.max(...values, -Infinity), options.most ?? Infinity);
    const fitted = () => (values.length ? ticksOf(options.fromZero ? 0 : Math.min(...values), highest, 5) : [0, 1]);
    const scale = options.yTicks ?? fitted();
    const left = 16 + 7 * Math.max(...scale.map((tick) => short(tick).length));
    const box = { x0: left + 8, x1: width - 12, y0: height - (options.xTitle ? 40 : 44), y1: 8 + 31 * failed };
    const toY = (y) => box.y0 + ((Math.min(y, scale.at(-1)) - scale[0]) / (scale.at(-1) - scale[0])) * (box.y1 - box.y0);
    const xs = shown.flatMap((series) => series.points.map((point) => point.x));
    const [first, last] = options.ticks ? [0, 0] : [Math.min(...xs), Math.max(...xs)];
    const toX = options.ticks
      ? (x) => box.x0 + ((options.ticks.indexOf(x) + 0.5) * (box.x1 - box.x0)) / options.ticks.length
      : (x) => box.x0 + ((x - first) / (last - first || 1)) * (box.x1 - box.x0);
    const xTicks =
      options.ticks ??
      (xs.length ? ticksOf(first, last, Math.max(2, width / 110)).filter((x) => x >= first && x <= last) : []);
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.replaceChildren(
      ...scale.flatMap((tick, i) => [
        svg("path", { class: i ? "grid" : "axis", d: `M${box.x0} ${toY(tick).toFixed(1)}H${box.x1}` }),
        svg("text", { x: box.x0 - 6, y: toY(tick) + 4, "text-anchor": "end" }, short(tick)),
      ]),
      ...xTicks.map((tick) =>
        svg(
          "text",
          { x: toX(tick), y: box.y0 + 15, "text-anchor": "middle" },
          String(options.ticks ? tick : short(tick))
            .split("\n")
            .map((part, i) => svg("tspan", { x: toX(tick), dy: i ? 12 : 0 }, part)),
        ),
      ),
      svg("text", { class: "quiet", x: (box.x0 + box.x1) / 2, y: height - 6, "text-anchor": "middle" }, options.xTitle),
      svg(
        "text",
        { class: "quiet", "text-anchor": "middle", transform: `translate(11 ${(box.y0 + box.y1) / 2}) rotate(-90)` },
        options.yTitle,
      ),
    );
    spots = [];
    for (const series of shown) {
      const reached = series.points.filter((point) => point.y !== null);
      const line = reached.map((point) => `${toX(point.x).toFixed(1)} ${toY(point.y).toFixed(1)}`).join("L");
      plot.append(
        svg(
          "g",
          { class: series.colour },
          series.join &&
            reached.length > 1 &&
            svg("path", { class: "join", d: `M${line}`, "stroke-dasharray": series.dash || null }),
          series.points.map((point) => {
            const shift = (ASIDE[series.marker] ?? 0) * (series.aside ? 1 : point.y === null ? 1.5 : 0);
            const spot = { series, point, x: toX(point.x) + shift, y: point.y === null ? box.y1 - 25 : toY(point.y) };
            spots.push(spot);
            return point.y === null
              ? svg("path", { class: "cross", d: `M${spot.x - 4} ${spot.y - 4}l8 8m0 -8l-8 8` })
              : marker(reached.length > 60 || series.marker === undefined ? "none" : series.marker, spot.x, spot.y);
          }),
        ),
      );
    }
    for (const tick of new Set(spots.filter((spot) => spot.point.y === null).map((spot) => spot.point.x))) {
      plot.append(svg("text", { x: toX(tick), y: box.y1 - 9, "text-anchor": "middle" }, "OOM"));
    }
    tip.textContent = "";
    at = -1;
  }

  function show(spot) {
    plot.querySelector(".ring")?.remove();
    plot.querySelector(".guide")?.remove();
    at = spot ? spots.indexOf(spot) : -1;
    if (!spot) {
      tip.textContent = "";
      return;
    }
    const alongside = options.ticks ? [spot] : spots.filter((other) => other.point.x === spot.point.x);
    if (!options.ticks) plot.append(svg("path", { class: "guide", d: `M${spot.x} 8V${plot.clientHeight - 40}` }));
    plot.append(svg("circle", { class: "ring", cx: spot.x, cy: spot.y, r: 8 }));
    tip.textContent = options.ticks
      ? `${spot.point.text()}\n${spot.series.name}`
      : [
          `${options.xTitle} ${short(spot.point.x)}`,
          ...alongside.map((other) => `${other.series.name}: ${other.point.text()}`),
        ].join("\n");
    const x = Math.min(Math.max(spot.x - tip.offsetWidth / 2, 0), Math.max(figure.clientWidth - tip.offsetWidth, 0));
    const y = plot.getBoundingClientRect().top - figure.getBoundingClientRect().top + spot.y;
    tip.style.left = `${x}px`;
    tip.style.top = `${y - tip.offsetHeight - 14 < 0 ? y + 14 : y - tip.offsetHeight - 14}px`;
  }

  plot.addEventListener("pointermove", (event) => {
    const bounds = plot.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const far = (spot) =>
      options.ticks ? Math.hypot(spot.x - x, spot.y - y) : Math.abs(spot.x - x) + Math.abs(spot.y - y) / 1000;
    const nearest = spots.reduce((best, spot) => (!best || far(spot) < far(best) ? spot : best), null);
    show(nearest && (!options.ticks || far(nearest) < 40) ? nearest : null);
  });
  plot.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!step || !spots.length) return;
    event.preventDefault();
    show(spots[(Math.max(at, step > 0 ? at : 0) + step + spots.length) % spots.length]);
  });
  drawWhenNear(figure, () => {
    draw();
    let width = plot.clientWidth;
    new ResizeObserver(() => {
      if (plot.clientWidth !== width) {
        width = plot.clientWidth;
        draw();
      }
    }).observe(plot);
  });
  return figure;
}

/** One panel of a figure: lines through experiments, by colour; who measured them, by marker. */
function sweepChart(figure, panel) {
  const lines = [...new Set(panel.series.map((series) => series.line))];
  const sources = [...new Map(panel.series.map((series) => [series.where, series])).values()];
  const colour = (line) => `c${lines.indexOf(line) % 6}`;
  const named = ({ source, where }) => {
    const shown = SEVERAL_VERSIONS ? where : where.replace(/, Megatron-LM core .*/, "");
    return source === "half" ? shown : `${SOURCES[source]}: ${shown.replace(/^(published|reference): /, "")}`;
  };
  const order = Object.keys(SOURCES);
  const drawn = [...panel.series].sort((a, b) => order.indexOf(a.source) - order.indexOf(b.source));
  return chart({
    title: panel.title,
    yTitle: panel.y_title,
    xTitle: panel.x_title,
    ticks: panel.ticks,
    yTicks: panel.y_ticks,
    legend: [
      ...lines.map((line) => ({ key: `line ${line}`, name: line, colour: colour(line), dash: "" })),
      ...sources.map((series) => ({
        key: `where ${series.where}`,
        name: named(series),
        colour: "ink",
        marker: series.source,
        dash: panel.order ? (LINES[series.source] ?? null) : null,
      })),
    ],
    series: drawn.map((series) => ({
      colour: colour(series.line),
      marker: series.source,
      dash: LINES[series.source],
      aside: !panel.order,
      join: panel.order && series.source !== "reference",
      keys: [`line ${series.line}`, `where ${series.where}`],
      name: `${series.line}, ${named(series)}`,
      points: series.points.map((point) => ({
        x: point.tick,
        y: point.value,
        text: () =>
          point.value === null
            ? `${point.id}: out of memory`
            : `${point.id}: ${short(point.value)}${point.spread ? ` ± ${short(point.spread)}` : ""} ${panel.y_title.split(", ").pop()}`,
      })),
    })),
  });
}

/** A quantity of several runs over steps or seconds. unit, digits: the format of values. */
function curveChart({ title, quantity, xTitle, unit, digits, chosen, fromZero }) {
  const drawn = chosen.map((row, i) => ({ row, i, curve: row.curves?.[quantity] })).filter(({ curve }) => curve);
  const xOf = (curve, i) => (curve.x ? curve.x[i] : i + 1);
  const series = drawn.map(({ row, i, curve }) => ({
    colour: `c${i % 6}`,
    dash: DASHES[i % 6],
    marker: curve.y.length === 1 ? "here" : undefined,
    join: true,
    keys: [String(i)],
    name: nameOf(row),
    points: curve.y
      .map((y, k) => ({ x: xOf(curve, k), y, text: () => `${number(y, digits)} ${unit}`.trim() }))
      .filter((point) => point.y !== null),
  }));
  const values = series.flatMap((one) =>
    one.points.filter((point) => quantity !== "step_ms" || point.x > 5).map((point) => point.y),
  );
  const most = quantity === "step_ms" && values.length ? 1.15 * Math.max(...values) : undefined;
  const yTitle = { loss: "loss", step_ms: "step time, ms", memory_gib: "memory, GiB" }[quantity];
  return chart({
    title,
    xTitle,
    yTitle,
    fromZero,
    most,
    series,
    legend: drawn.map(({ row, i }) => ({ key: String(i), name: nameOf(row), colour: `c${i % 6}`, dash: DASHES[i % 6] })),
  });
}
