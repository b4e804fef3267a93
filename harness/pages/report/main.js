// Theme, summary, sections.
const THEMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
const remembered = {
  get: () => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null;
    }
  },
  set: (value) => {
    try {
      localStorage.setItem("theme", value);
    } catch {
      /* not kept */
    }
  },
};
let theme = remembered.get() in THEMES ? remembered.get() : "auto";
function showTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = THEMES[theme];
}
byId("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES);
  theme = order[(order.indexOf(theme) + 1) % order.length];
  remembered.set(theme);
  showTheme();
});
showTheme();

const measured = rows.filter((row) => row.kind !== "catalogue");
byId("summary").textContent =
  `${measured.length} runs and records on ${[...new Set(measured.map((row) => row.hardware))].join(", ") || "nothing yet"}; ` +
  `${data.ended.as_published} of the ${data.ended.experiments} experiments with a published row ended as published, complete or out of memory.`;

const comparing = compare(byId("compare"));
const everyRow = table(byId("rows"), comparing);
chapters(byId("chapters"), everyRow);
claims(byId("claims"));
timelines(byId("timelines"));
losses(byId("losses"));
notes(byId("notes"));
