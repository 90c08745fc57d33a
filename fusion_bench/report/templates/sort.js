"use strict";
// Makes the columns of <table class="sortable"> sort: every header becomes a button.
const missing = (text) => text === "" || text === "–";
const read = (row, column) => {
  const cell = row.cells[column];
  return (cell.dataset.value ?? cell.textContent).trim();
};
const compare = (a, b) => {
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b, undefined, {numeric: true}) : difference;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      // Numbers start with the best, words with the first.
      const numbers = header.classList.contains("num") && !header.classList.contains("lower");
      const first = numbers ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? other : first;
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row) => [read(row, column), row]);
      rows.sort(([a], [b]) => missing(a) - missing(b) || sign * compare(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
// A copy button copies the text of the element that it names.
for (const button of document.querySelectorAll("button[data-copies]")) {
  const source = document.getElementById(button.dataset.copies);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      // A page from a file may not use the clipboard: select the text for Ctrl-C.
      getSelection().selectAllChildren(source);
      button.textContent = "Press Ctrl-C";
    }
  });
}
