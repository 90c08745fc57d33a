"use strict";
// Filters and selects runs, ranks what is left, and puts two runs side by side. It runs before
// sort.js, and copies what the tables show: texts stay texts.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const filter = document.getElementById("filter");
if (filter) {
  const [words, method, table, state, pair] =
    ["words", "method", "table", "state", "pair"].map((id) => document.getElementById(id));
  const list = document.getElementById("list");
  const runs = new Map(all("tbody tr", list).map((row) => [row.dataset.run, row]));
  const boards = all(".board");
  const heading = document.getElementById("leaderboards");
  const chosen = new Set();
  const boxes = new Map();
  const names = new Map();
  const texts = new Map();

  for (const [run, row] of runs) {
    const cell = row.querySelector("th");
    names.set(run, cell.textContent.trim());
    texts.set(run, row.textContent.toLowerCase());
    const box = document.createElement("input");
    box.type = "checkbox";
    box.ariaLabel = `Select ${names.get(run)}`;
    box.addEventListener("change", () => {
      chosen[box.checked ? "add" : "delete"](run);
      show();
    });
    boxes.set(run, box);
    cell.prepend(box, " ");
  }

  const shown = () => [...runs.keys()].filter((run) => !runs.get(run).hidden);

  const select = (which) => {
    chosen.clear();
    for (const run of which) chosen.add(run);
    for (const [run, box] of boxes) box.checked = chosen.has(run);
    show();
  };

  // As in report/index.py: those that are not distinguishable from the best share its rank.
  const rank = (board) => {
    const {ranked, lower} = board.dataset;
    const sign = lower ? -1 : 1;
    const score = (row) => Number(row.dataset.score), error = (row) => Number(row.dataset.error);
    let waiting = all("tr[data-run]", board)
      .filter((row) => ranked && !row.hidden && row.dataset.score !== "")
      .sort((a, b) => sign * (score(b) - score(a)));
    let count = 0;
    while (waiting.length) {
      const best = waiting[0], place = count + 1;
      waiting = waiting.filter((row) => {
        const apart = Math.abs(score(row) - score(best));
        const alike = row === best || apart <= 1.96 * Math.hypot(error(row), error(best));
        if (alike) {
          row.cells[0].textContent = place;
          count += 1;
        }
        return !alike;
      });
    }
  };

  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [run, row] of runs) {
      row.hidden = !(
        (!method.value || row.dataset.method === method.value) &&
        (!table.value || row.dataset.table === table.value) &&
        wanted.every((word) => texts.get(run).includes(word))
      );
    }
    const left = chosen.size ? chosen : new Set(shown());
    for (const board of boards) {
      const rows = all("tr[data-run]", board);
      for (const row of rows) row.hidden = !left.has(row.dataset.run);
      board.hidden = rows.every((row) => row.hidden);
      // A picture is of all runs.
      for (const each of all("figure", board)) each.hidden = rows.some((row) => row.hidden);
      rank(board.querySelector("table"));
    }
    if (heading) {
      heading.textContent = chosen.size ? "Leaderboard of the selection" : "Leaderboards";
    }
    const help = chosen.size < 2
      ? "Select two to see them side by side, or more for their leaderboard." : "";
    state.textContent =
      `${shown().length} of ${runs.size} runs shown, ${chosen.size} selected. ${help}`;
    document.getElementById("see").hidden = pair.hidden = chosen.size !== 2;
    if (!pair.hidden) beside(...[...chosen]);
  };

  const line = (to, head, ...cells) => {
    const row = document.createElement("tr");
    const first = document.createElement("th");
    first.scope = "row";
    first.append(head);
    row.append(first, ...cells);
    to.append(row);
    return row;
  };

  const copy = (cell) => {
    const own = document.createElement("td");
    own.className = cell?.className ?? "";
    own.append(...(cell ? cell.cloneNode(true).childNodes : ["–"]));
    return own;
  };

  const text = (words) => {
    const cell = document.createElement("td");
    cell.className = "num";
    cell.textContent = words;
    return cell;
  };

  const signed = (value, unit) => {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    const words = unit === "%" ? (100 * size).toFixed(1) : String(Number(size.toPrecision(3)));
    return `${value < 0 ? "−" : "+"}${words}`;
  };

  const facts = (board) => new Map(
    all("dt", board).map((name) => [name.textContent, name.nextElementSibling.textContent])
  );

  // Each task's cell of a run, with its unit.
  const results = (run) => {
    const found = new Map();
    const row = document.querySelector(`.board tr[data-run="${run}"]`);
    for (const head of row ? all("th[data-task]", row.closest("table")) : []) {
      found.set(head.dataset.task, [row.cells[head.cellIndex], head.dataset.unit, head]);
    }
    return found;
  };

  const beside = (one, other) => {
    const [head, body] = [pair.querySelector("thead"), pair.querySelector("tbody")];
    head.replaceChildren();
    body.replaceChildren();
    const top = document.createElement("tr");
    const titles = [one, other].map((run) => runs.get(run).querySelector("a, bdi").cloneNode(true));
    for (const title of ["", ...titles, "second − first"]) {
      const cell = document.createElement(title ? "th" : "td");
      if (title) cell.scope = "col";
      cell.append(title);
      top.append(cell);
    }
    head.append(top);
    const rows = [runs.get(one), runs.get(other)];
    const boardsOf = rows.map((row) => boards[row.dataset.table]);
    const alike = boardsOf[0] !== undefined && boardsOf[0] === boardsOf[1];
    const change = (first, second, unit, same) =>
      alike && unit === same && first.dataset.value && second.dataset.value
        ? signed(second.dataset.value - first.dataset.value, unit) : "";
    const add = (header) => {
      const cells = rows.map((row) => row.cells[header.cellIndex]);
      const units = cells.map((cell) => cell.dataset.unit ?? header.dataset.unit);
      const known = units[0] !== undefined ? change(...cells, ...units) : "";
      const row = line(body, header.textContent, ...cells.map(copy), text(known));
      if (cells[0].textContent === cells[1].textContent) row.className = "soft";
    };
    const headers = all("th[data-beside]", list.tHead);
    headers.filter((header) => header.dataset.beside === "figure").forEach(add);
    const [mine, theirs] = [one, other].map(results);
    for (const [task, [cell, unit, header]] of mine) {
      if (!theirs.has(task)) continue;
      const [second, same] = theirs.get(task);
      const known = text(change(cell, second, unit, same));
      line(body, header.textContent, copy(cell), copy(second), known);
    }
    headers.filter((header) => header.dataset.beside === "setting").forEach(add);
    const unlike = document.getElementById("unlike");
    unlike.hidden = alike;
    if (!alike && boardsOf.every(Boolean)) {
      const [first, second] = boardsOf.map(facts);
      const what = [...new Set([...first.keys(), ...second.keys()])]
        .filter((name) => first.get(name) !== second.get(name));
      unlike.textContent =
        `The runs were evaluated differently, so there are no differences: ${what.join(", ")}.`;
    } else if (!alike) {
      unlike.textContent = "A run was not evaluated, so there are no differences.";
    }
    const paths = rows.map((row) => row.dataset.path);
    const paired = document.getElementById("paired");
    paired.hidden = !alike || !paths.every(Boolean);
    document.getElementById("command").textContent = `fusion_bench compare ${paths.join(" ")}`;
  };

  filter.hidden = false;
  filter.addEventListener("submit", (event) => event.preventDefault());
  for (const event of ["input", "change"]) filter.addEventListener(event, show);
  document.getElementById("all").addEventListener("click", () => select(shown()));
  document.getElementById("none").addEventListener("click", () => select([]));
  addEventListener("pageshow", show); // the browser may have kept what was typed
  show();
}
