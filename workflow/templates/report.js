"use strict";
// Sorting and filtering of the tables; without it they are there all the same.

const value = (row, column) => {
  const text = row.cells[column].dataset.v;
  if (text === undefined) return row.cells[column].textContent.trim();
  return text === "" ? null : Number(text);
};

const compare = (a, b) =>
  typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });

// What is unknown comes last, whichever way is up.
const order = (a, b, sign) => {
  const [noA, noB] = [a === null || a === "", b === null || b === ""];
  return noA || noB ? noA - noB : sign * compare(a, b);
};

function sort(table, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => order(value(a, head.cellIndex), value(b, head.cellIndex), down ? -1 : 1));
  table.tBodies[0].append(...rows);
}

const tests = {
  "=": (a, b) => compare(a, b) === 0,
  "<": (a, b) => compare(a, b) < 0,
  ">": (a, b) => compare(a, b) > 0,
  "<=": (a, b) => compare(a, b) <= 0,
  ">=": (a, b) => compare(a, b) >= 0,
};

// "failed batch>=32": a word is looked for in the whole row, a comparison in its column.
function term(table, word) {
  const [, key, sign, wanted] = word.match(/^(\w+)(<=|>=|=|<|>)(.+)$/) || [];
  const head = [...table.tHead.rows[0].cells].find((cell) => key && cell.dataset.key === key);
  if (!head) return (row) => row.textContent.toLowerCase().includes(word);
  const number = Number(wanted);
  return (row) => {
    const found = value(row, head.cellIndex);
    if (found === null) return false;
    if (typeof found === "string") return tests[sign](found.toLowerCase(), wanted);
    return !Number.isNaN(number) && tests[sign](found, number);
  };
}

function filter(table, text, said) {
  const terms = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => term(table, word));
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) row.hidden = !terms.every((test) => test(row));
  said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
  const tools = document.getElementById(`${table.id}-tools`);
  const [input, said] = [tools.querySelector("input"), tools.querySelector("output")];
  tools.hidden = false;
  input.addEventListener("input", () => filter(table, input.value, said));
  filter(table, input.value, said);
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
