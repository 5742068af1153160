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
