// Sorting: clicking a column heading sorts the rows within each section. Empty cells come last.
for (const button of document.querySelectorAll("table.ranking thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = (row) => row.children[column].dataset.key;
    const numeric = heading.classList.contains("number");
    const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
      rows.sort((a, b) => {
        if (!key(a) || !key(b)) return Boolean(key(b)) - Boolean(key(a));
        return ascending ? compare(key(a), key(b)) : compare(key(b), key(a));
      });
      body.append(...rows);
    }
  });
}

// Filtering: only rows that contain every word, in any column, are shown. Escape clears the filter.
for (const field of document.querySelectorAll(".filter")) {
  const input = field.querySelector("input");
  const rows = [...field.nextElementSibling.querySelectorAll("tbody tr:not(.section)")];
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
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

// Images: a click enlarges one; the arrow keys show the next and the previous of the same title.
const dialog = document.createElement("dialog");
dialog.innerHTML = "<img alt=''><p></p>";
document.body.append(dialog);
let enlarged = null;
const enlarge = (button) => {
  enlarged = button;
  const source = button.querySelector("img");
  dialog.querySelector("img").src = source.src;
  dialog.querySelector("img").alt = source.alt;
  dialog.querySelector("p").textContent = button.closest("figure").querySelector("figcaption").innerText.replace(/\n+/g, ": ");
  if (!dialog.open) dialog.showModal();
};
for (const button of document.querySelectorAll(".enlarge")) button.addEventListener("click", () => enlarge(button));
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const group = [...enlarged.closest(".images").querySelectorAll(".enlarge")];
  enlarge(group[(group.indexOf(enlarged) + step + group.length) % group.length]);
});

// Tooltips show the name and value of the nearest point of a chart. The attribute data-axes maps coordinates to values.
const tooltip = document.createElement("div");
tooltip.id = "tooltip";
tooltip.hidden = true;
document.body.append(tooltip);
const MAX_DISTANCE = 14;

const inverseScale = (kind, start, low, end, high) => {
  const [a, b] = kind === "log" ? [Math.log(low), Math.log(high)] : [low, high];
  return (coordinate) => {
    const value = a + ((coordinate - start) / (end - start)) * (b - a);
    return kind === "log" ? Math.exp(value) : value;
  };
};
const format = (value) => value.toLocaleString("en", {
  maximumSignificantDigits: 4, notation: Math.abs(value) >= 1e5 ? "compact" : "standard",
});

// The points of all named lines in drawing order; each point of a path refers to the previous one.
const pointsOf = (svg) => [...svg.querySelectorAll('g[data-name]:not([data-name=""])')].flatMap((line) => {
  const { name } = line.dataset;
  const path = line.querySelector("path");
  if (path && !path.closest("defs")) {
    const numbers = (path.getAttribute("d").match(/-?[\d.]+(?:e-?\d+)?/g) || []).map(Number);
    const vertices = [];
    for (let k = 0; k + 1 < numbers.length; k += 2) vertices.push({ x: numbers[k], y: numbers[k + 1], name });
    vertices.forEach((point, k) => { point.previous = vertices[k - 1]; });
    if (vertices.length > 1) return vertices;
  }
  return [...line.querySelectorAll("use")].map((use) => ({ x: +use.getAttribute("x"), y: +use.getAttribute("y"), name }));
});

// Squared distance between two points, and from a position to the segment that ends at a point.
const squaredDistance = (a, b) => (a.x - b.x) ** 2 + (a.y - b.y) ** 2;
const squaredDistanceToSegment = (position, end) => {
  const start = end.previous;
  const length = start ? squaredDistance(start, end) : 0;
  if (!length) return squaredDistance(position, end);
  const projection = (position.x - start.x) * (end.x - start.x) + (position.y - start.y) * (end.y - start.y);
  const t = Math.min(1, Math.max(0, projection / length));
  return squaredDistance(position, { x: start.x + t * (end.x - start.x), y: start.y + t * (end.y - start.y) });
};

for (const svg of document.querySelectorAll("svg.chart[data-axes]")) {
  const parts = svg.dataset.axes.split(" ");
  const toX = inverseScale(parts[0], ...parts.slice(1, 5).map(Number));
  const toY = inverseScale(parts[5], ...parts.slice(6).map(Number));
  let points = null;
  svg.addEventListener("pointermove", (event) => {
    points ||= pointsOf(svg);
    const position = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = null;
    let least = MAX_DISTANCE ** 2;
    for (const point of points) {
      const distance = squaredDistanceToSegment(position, point);
      if (distance < least) [nearest, least] = [point, distance];
    }
    tooltip.hidden = !nearest;
    if (!nearest) return;
    const { previous } = nearest;
    if (previous && squaredDistance(position, previous) < squaredDistance(position, nearest)) nearest = previous;
    tooltip.textContent = `${nearest.name}: ${format(toY(nearest.y))} at ${format(toX(nearest.x))}`;
    tooltip.style.left = `${Math.min(event.clientX + 14, innerWidth - tooltip.offsetWidth - 8)}px`;
    tooltip.style.top = `${Math.max(event.clientY - tooltip.offsetHeight - 10, 4)}px`;
  });
  svg.addEventListener("pointerleave", () => { tooltip.hidden = true; });
}
