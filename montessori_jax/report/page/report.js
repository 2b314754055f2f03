"use strict";
// Every text is shown by text nodes: nothing a model wrote is ever read as HTML.

// The same characters as `HIDDEN` in markup.py.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]|[\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;
const PAGE = 25;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Fill `parent` with `text`, each hidden character as its code point. */
function show(parent, text) {
  let last = 0;
  for (const found of text.matchAll(HIDDEN)) {
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parent.append(text.slice(last, found.index));
    parent.append(element("span", { class: "code", dir: "ltr" }, `U+${code}`));
    last = found.index + found[0].length;
  }
  parent.append(text.slice(last));
  return parent;
}

function textBlock(text) {
  return show(element("div", { class: "text", dir: "auto" }), text);
}

// Tables

function setSort(heads, chosen, direction) {
  for (const head of heads) head.removeAttribute("aria-sort");
  chosen.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, place) => {
    const button = element("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const numeric = head.classList.contains("number");
      const value = (row) => {
        const cell = row.cells[place];
        if (!numeric) return cell.textContent;
        const number = parseFloat(cell.dataset.order ?? cell.textContent);
        return Number.isNaN(number) ? null : number;
      };
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return direction * (numeric ? a - b : a.localeCompare(b));
      });
      body.append(...rows.map(([, row]) => row));
      setSort(heads, head, direction);
    });
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);

// Samples

function startSamples(data) {
  const find = (id) => document.getElementById(id);
  const table = find("samples-table");
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const samples = data.samples.map(([prompt, id, influence, rank, instruction, response, finish]) => ({
    prompt, id, influence, rank, instruction, response, finish,
    group: data.prompts[prompt][0], length: instruction.length + response.length,
  }));
  const siblings = data.prompts.map(() => []);
  for (const sample of samples) siblings[sample.prompt].push(sample);
  const state = { key: "influence", direction: -1, page: 0, query: "", group: -1, side: "all" };
  let matching = [];

  const remarks = data.groups.map((group) => {
    const all = group.shown === group.total;
    const shown = group.shown.toLocaleString("en"), total = group.total.toLocaleString("en");
    const what = all ? `all ${total} probed samples`
      : `${shown} of ${total} probed samples (whole prompts: those of the most helpful and the most harmful ones, and a tenth at random)`;
    return `${group.label}: ${what}${group.finished ? "" : ", as far as influence has got"}.`;
  });
  find("samples-note").textContent = `${remarks.join(" ")} Texts are shown up to `
    + `${data.longest.toLocaleString("en")} characters. Influence is in nats of reference loss; positive helps the student.`;
  const group = find("samples-group");
  group.append(element("option", { value: "-1" }, "all runs and iterations"));
  data.groups.forEach((one, place) => group.append(element("option", { value: place }, one.label)));

  function key(sample) {
    if (state.key === "prompt") return data.prompts[sample.prompt][1];
    return sample[state.key];
  }

  function select() {
    const query = state.query.trim().toLowerCase();
    matching = samples.filter((sample) => {
      if (state.group >= 0 && sample.group !== state.group) return false;
      if (state.side === "helpful" && !(sample.influence > 0)) return false;
      if (state.side === "harmful" && !(sample.influence < 0)) return false;
      if (!query) return true;
      sample.lower ??= `${sample.instruction}\n${sample.response}`.toLowerCase();
      return sample.lower.includes(query);
    });
    matching.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return state.direction * (typeof x === "string" ? (x < y ? -1 : x > y ? 1 : 0) : x - y);
    });
    state.page = 0;
    render();
  }

  function amount(influence) {
    if (influence === null) return element("span", {}, "not scored");
    const kind = influence > 0 ? "helps" : "harms";
    const text = `${influence > 0 ? "+" : ""}${influence.toExponential(2)}`.replaceAll("-", "\u2212");
    return element("span", { class: kind, title: kind }, text);
  }

  function detail(sample, name) {
    const cell = element("td", { colspan: "5" });
    const part = (title, content) => cell.append(element("h4", {}, title), content);
    part("Instruction", textBlock(sample.instruction));
    const ended = sample.finish === "length" ? " (cut off by the token limit)" : "";
    part(`Response${ended}`, textBlock(sample.response));
    const list = element("ul", { class: "siblings" });
    const ordered = [...siblings[sample.prompt]].sort((a, b) => b.influence - a.influence);
    // Under an instruction it is the responses that compete.
    const alike = ordered.every((one) => one.instruction === sample.instruction);
    for (const one of ordered) {
      const item = element("li", one === sample ? { "aria-current": "true" } : {}, amount(one.influence));
      item.append(textBlock(alike ? one.response : one.instruction));
      list.append(item);
    }
    part(`Candidates of the same prompt, ${ordered.length}`, list);
    const asked = data.prompts[sample.prompt][2];
    if (asked) {
      const turns = typeof asked === "string" ? [["text", asked]] : asked;
      const prompt = element("details", {}, element("summary", {}, "What the teacher was asked"));
      for (const [role, text] of turns) prompt.append(element("h4", {}, role), textBlock(text));
      cell.append(prompt);
    }
    return element("tr", { class: "detail", id: name }, cell);
  }

  function render() {
    const pages = Math.max(1, Math.ceil(matching.length / PAGE));
    const start = state.page * PAGE;
    body.replaceChildren();
    matching.slice(start, start + PAGE).forEach((sample, place) => {
      const name = `sample-${start + place}`;
      const preview = show(element("span", { dir: "auto" }), sample.instruction.slice(0, 400));
      const button = element("button", { type: "button", class: "open", "aria-expanded": "false" }, preview);
      const row = element("tr", {},
        element("td", { class: "number" }, amount(sample.influence)),
        element("td", { class: "number" }, sample.rank === null ? "—" : `#${sample.rank}`),
        element("td", {}, button),
        element("td", { class: "number" }, String(sample.length)),
        show(element("td"), data.prompts[sample.prompt][1]));
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        if (open) {
          document.getElementById(name).remove();
          button.removeAttribute("aria-controls");
        } else {
          row.after(detail(sample, name));
          button.setAttribute("aria-controls", name);
        }
      });
      body.append(row);
    });
    const count = matching.length.toLocaleString("en");
    find("samples-count").textContent = matching.length === samples.length
      ? `${count} samples` : `${count} of ${samples.length.toLocaleString("en")} samples`;
    find("page-place").textContent = `page ${state.page + 1} of ${pages}`;
    find("page-first").disabled = find("page-back").disabled = state.page === 0;
    find("page-last").disabled = find("page-next").disabled = state.page >= pages - 1;
  }

  function turn(page) {
    const pages = Math.max(1, Math.ceil(matching.length / PAGE));
    state.page = Math.min(Math.max(page, 0), pages - 1);
    render();
  }

  function sortBy(head, direction) {
    state.key = head.dataset.key;
    state.direction = direction;
    setSort(heads, head, direction);
  }

  heads.forEach((head) => head.firstElementChild.addEventListener("click", () => {
    const same = state.key === head.dataset.key;
    sortBy(head, same ? -state.direction : head.dataset.key === "influence" ? -1 : 1);
    select();
  }));
  let waiting = 0;
  find("samples-search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = event.target.value; select(); }, 120);
  });
  find("samples-form").addEventListener("submit", (event) => event.preventDefault());
  group.addEventListener("change", () => { state.group = Number(group.value); select(); });
  find("samples-side").addEventListener("change", (event) => {
    state.side = event.target.value;
    if (state.side !== "all") sortBy(heads[0], state.side === "helpful" ? -1 : 1);
    select();
  });
  find("page-first").addEventListener("click", () => turn(0));
  find("page-back").addEventListener("click", () => turn(state.page - 1));
  find("page-next").addEventListener("click", () => turn(state.page + 1));
  find("page-last").addEventListener("click", () => turn(Infinity));
  sortBy(heads[0], -1);
  select();
}

const block = document.getElementById("samples-data");
if (document.getElementById("samples-table")) startSamples(JSON.parse(block.textContent));
document.documentElement.dataset.ready = "true";
