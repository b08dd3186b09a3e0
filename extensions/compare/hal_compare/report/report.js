"use strict";
// Sorting of tables, and folding of variants. Without this script the page shows everything, in its first order.
document.documentElement.classList.add("js");

const LAST = Infinity;

// What a row sorts by in a column: figures by (measured before modelled, value), texts by their letters.
const key = (row, place) => {
  const cell = row.cells[place];
  const given = cell.dataset.value;
  return { group: Number(cell.dataset.group || 0), value: given === undefined ? LAST : Number(given), text: cell.textContent };
};

const order = (place, falling) => (one, other) => {
  const a = key(one, place);
  const b = key(other, place);
  if ((a.value === LAST) !== (b.value === LAST)) return a.value === LAST ? 1 : -1; // what is not available comes last
  if (a.group !== b.group) return a.group - b.group;
  const rising = a.value === b.value ? a.text.localeCompare(b.text) : a.value - b.value;
  return falling ? -rising : rising;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const bodies = [...table.tBodies];
      for (const body of bodies) {
        const [lead, ...variants] = body.rows;
        body.append(lead, ...variants.sort(order(place, falling)));
      }
      bodies.sort((a, b) => order(place, falling)(a.rows[0], b.rows[0]));
      table.append(...bodies);
    });
  });
}

for (const button of document.querySelectorAll("button.fold")) {
  const rows = button.getAttribute("aria-controls").split(" ").map((id) => document.getElementById(id));
  const show = (open) => {
    button.setAttribute("aria-expanded", String(open));
    for (const row of rows) row.hidden = !open;
  };
  button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
  show(false);
}
