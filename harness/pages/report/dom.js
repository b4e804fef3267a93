// The data of the page, and the few functions that make elements. Text is only ever set as text.
const data = JSON.parse(document.getElementById("data").textContent);
const names = Object.keys(data.rows);
const rows = data.rows.id.map((_, index) =>
  Object.fromEntries([["index", index], ...names.map((name) => [name, data.rows[name][index]])]),
);
const byId = (id) => document.getElementById(id);

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
/** key -> the items that have it, in order. */
function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
}
const add = (node, ...children) => made(node, null, children);
const el = (tag, attributes, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Making a formatter is slow, using one is not.
const fixed = [0, 1, 2, 3, 4].map(
  (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }),
);
const large = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const small = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const rough = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const number = (value, digits) => (value === null || value === undefined ? "" : fixed[digits].format(value));
const milliseconds = (value) => number(value, value < 1000 ? 1 : 0);
const short = (value) => (Math.abs(value) >= 100 ? large : small).format(value);

const nameOf = (row) => (row.kind === "record" ? `${row.label.split("/").pop()} (record)` : row.label);
const torchrunOf = (row) => row.torchrun.map((line) => data.lines[line]).join("\n");

/** A command with a button that copies it, or selects it where the browser refuses the clipboard. */
function command(title, text) {
  const code = el("pre", { tabindex: 0, "aria-label": title }, text);
  const button = el(
    "button",
    {
      type: "button",
      "aria-label": `Copy: ${title}`,
      onclick: async () => {
        let copied = false;
        try {
          await navigator.clipboard.writeText(text);
          copied = true;
        } catch {
          getSelection().selectAllChildren(code);
          copied = document.execCommand("copy");
        }
        button.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
        setTimeout(() => {
          button.textContent = "Copy";
        }, 2000);
      },
    },
    "Copy",
  );
  return el("div", { class: "command" }, code, button);
}

/** Calls draw once: when the element comes near the window, before printing, or when the browser is idle. */
const waiting = new Map();
const near = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawNow(entry.target)),
  { rootMargin: "500px" },
);
const whenIdle = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));
function drawNow(element) {
  const draw = waiting.get(element);
  waiting.delete(element);
  near.unobserve(element);
  draw?.();
}
function drawNext() {
  const [element] = waiting.keys();
  if (!element) return;
  drawNow(element);
  whenIdle(drawNext);
}
function drawWhenNear(element, draw) {
  if (!waiting.size) whenIdle(drawNext);
  waiting.set(element, draw);
  near.observe(element);
}
addEventListener("beforeprint", () => [...waiting.keys()].forEach(drawNow));
