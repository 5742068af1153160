// Sorting: a click on a column's heading orders the rows of each section; empty cells stay last.
for (const button of document.querySelectorAll("table.ranking thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const upward = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", upward ? "ascending" : "descending");
    const key = (row) => row.children[column].dataset.key;
    const numeric = heading.classList.contains("number");
    const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
      rows.sort((a, b) => {
        if (!key(a) || !key(b)) return Boolean(key(b)) - Boolean(key(a));
        return upward ? compare(key(a), key(b)) : compare(key(b), key(a));
      });
      body.append(...rows);
    }
  });
}

// Filtering: rows that hold every word of the box, in any column; Escape empties it.
for (const field of document.querySelectorAll(".filter")) {
  const input = field.querySelector("input");
  const rows = [...field.nextElementSibling.querySelectorAll("tbody tr:not(.section)")];
  const texts = rows.map((row) => row.innerText.toLowerCase());
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, k) => { row.hidden = !words.every((word) => texts[k].includes(word)); });
    const shown = rows.filter((row) => !row.hidden).length;
    field.querySelector("output").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  input.addEventListener("input", apply);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { input.value = ""; apply(); }
  });
  field.hidden = false;
}

// Hovering: the nearest point of a chart, by name and value. A coordinate is turned back into a value by data-axes.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
const REACH = 14;

const scale = (kind, start, low, end, high) => {
  const [a, b] = kind === "log" ? [Math.log(low), Math.log(high)] : [low, high];
  return (at) => {
    const value = a + ((at - start) / (end - start)) * (b - a);
    return kind === "log" ? Math.exp(value) : value;
  };
};
const said = (value) => value.toLocaleString("en", {
  maximumSignificantDigits: 4, notation: Math.abs(value) >= 1e5 ? "compact" : "standard",
});

// The points of every named line, in the order of the drawing; of a path, each with the one before it.
const pointsOf = (svg) => [...svg.querySelectorAll('g[data-name]:not([data-name=""])')].flatMap((line) => {
  const { name } = line.dataset;
  const path = line.querySelector("path");
  if (path && !path.closest("defs")) {
    const numbers = (path.getAttribute("d").match(/-?[\d.]+(?:e-?\d+)?/g) || []).map(Number);
    const along = [];
    for (let k = 0; k + 1 < numbers.length; k += 2) along.push({ x: numbers[k], y: numbers[k + 1], name });
    along.forEach((point, k) => { point.before = along[k - 1]; });
    if (along.length > 1) return along;
  }
  return [...line.querySelectorAll("use")].map((use) => ({ x: +use.getAttribute("x"), y: +use.getAttribute("y"), name }));
});

// Squared distance from a place to a point, and to the stretch that leads to it.
const square = (a, b) => (a.x - b.x) ** 2 + (a.y - b.y) ** 2;
const away = (at, point) => {
  const from = point.before;
  const length = from ? square(from, point) : 0;
  if (!length) return square(at, point);
  const along = ((at.x - from.x) * (point.x - from.x) + (at.y - from.y) * (point.y - from.y)) / length;
  const t = Math.min(1, Math.max(0, along));
  return square(at, { x: from.x + t * (point.x - from.x), y: from.y + t * (point.y - from.y) });
};

for (const svg of document.querySelectorAll("svg.chart")) {
  const parts = svg.dataset.axes.split(" ");
  const across = scale(parts[0], ...parts.slice(1, 5).map(Number));
  const up = scale(parts[5], ...parts.slice(6).map(Number));
  let points = null;
  svg.addEventListener("pointermove", (event) => {
    points ||= pointsOf(svg);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let near = null;
    let least = REACH * REACH;
    for (const point of points) {
      const distance = away(at, point);
      if (distance < least) [near, least] = [point, distance];
    }
    tip.hidden = !near;
    if (!near) return;
    if (near.before && square(at, near.before) < square(at, near)) near = near.before;
    tip.textContent = `${near.name}: ${said(up(near.y))} at ${said(across(near.x))}`;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 10, 4)}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
