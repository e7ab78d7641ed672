(() => {
  "use strict";
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Light or dark, whatever the system says.
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const button = document.createElement("button");
  button.className = "theme";
  button.type = "button";
  const name = () => { button.textContent = dark() ? "Light page" : "Dark page"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();
  document.querySelector(".masthead").append(button);

  // What is folded is printed.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));

  // Sort and filter claims: rows of the overview, and the cards behind them.
  const tools = document.getElementById("tools");
  const rows = all(".sortable tbody tr").map((row, order) => ({ row, order, home: row.parentNode, ...row.dataset }));
  const cards = new Map(all("article[data-claim]").map((card) => [card.dataset.claim, card]));
  const folds = all(".exploratory-rows").map((fold) => ({ fold, open: fold.open }));
  const verdicts = ["supported", "refuted", "inconclusive", "invalid"];
  const last = (value, sign) => (value === undefined ? Infinity : sign * Number(value));
  const keys = {
    verdict: (one) => verdicts.indexOf(one.verdict),
    estimate: (one) => last(one.estimate, -1),
    p: (one) => last(one.p, 1),
  };

  const arrange = (order) => {
    const key = keys[order] || ((one) => one.order);
    const compare = order === "name" ? (a, b) => a.text.localeCompare(b.text, "en", { numeric: true }) : (a, b) => key(a) - key(b) || a.order - b.order;
    all(".sortable").forEach((table) => table.classList.toggle("flat", order !== ""));
    const first = new Map();
    rows.slice().sort(compare).forEach((one) => {
      const table = one.home.parentNode;
      if (!first.has(table)) first.set(table, one.home.parentNode.tBodies[0]);
      (order ? first.get(table) : one.home).append(one.row);
    });
  };

  const filter = () => {
    const chosen = new FormData(tools);
    const asked = { verdict: chosen.getAll("verdict"), hypothesis: chosen.getAll("hypothesis") };
    const words = chosen.get("find").toLowerCase().split(/\s+/).filter(Boolean);
    const narrowed = words.length > 0 || chosen.get("tier") !== "" || all("[type=checkbox]:not(:checked)", tools).length > 0;
    const shown = new Set();
    let count = 0;
    rows.forEach((one) => {
      const text = one.text.toLowerCase();
      const fits = asked.verdict.includes(one.verdict) && asked.hypothesis.includes(one.hypothesis)
        && (chosen.get("tier") || one.tier) === one.tier && words.every((word) => text.includes(word));
      one.row.hidden = !fits;
      if (fits) { shown.add(one.claim); count += 1; }
    });
    cards.forEach((card, claim) => { card.hidden = !shown.has(claim); });
    all(".sortable").forEach((table) => { table.hidden = !table.querySelector("tbody tr:not([hidden])"); });
    folds.forEach(({ fold, open }) => {
      fold.hidden = Boolean(fold.querySelector(".sortable[hidden]"));
      fold.open = narrowed && !fold.hidden ? true : open;
    });
    all(".hypothesis-rows").forEach((group) => { group.hidden = !group.querySelector("tbody tr:not([hidden])"); });
    tools.querySelector("output").textContent = `${count} of ${rows.length} verdicts shown`;
  };

  if (tools && rows.length) {
    tools.hidden = false;
    tools.addEventListener("submit", (event) => event.preventDefault());
    tools.addEventListener("input", () => { arrange(tools.sort.value); filter(); });
    const everything = () => { tools.reset(); arrange(""); filter(); };
    tools.querySelector("button").addEventListener("click", everything);
    arrange(tools.sort.value); // a browser may remember what was asked before
    filter();
    // A link to a claim that the filter hides shows every claim again.
    addEventListener("hashchange", () => {
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (target && target.closest("[hidden]")) { everything(); target.scrollIntoView(); }
    });
  }

  // A cell of the head map opens its head's evidence beside the map; arrow keys move between cells.
  all(".head-map").forEach((map) => {
    const panel = map.querySelector(".opened");
    const cells = all("td a", map);
    const at = (row, column) => map.querySelector(`a[data-row="${row}"][data-column="${column}"]`);
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    cells.forEach((cell, place) => {
      cell.tabIndex = place ? -1 : 0;
      cell.addEventListener("keydown", (event) => {
        if (!move[event.key]) return;
        event.preventDefault();
        const [down, right] = move[event.key];
        const next = at(Number(cell.dataset.row) + down, Number(cell.dataset.column) + right);
        if (next) { cells.forEach((one) => { one.tabIndex = one === next ? 0 : -1; }); next.focus(); }
      });
      cell.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        const source = document.getElementById(cell.hash.slice(1)).closest("article, tbody");
        const copy = source.cloneNode(true);
        all("[id]", copy).forEach((one) => one.removeAttribute("id"));
        copy.removeAttribute("id");
        copy.removeAttribute("aria-labelledby");
        const body = panel.querySelector(".evidence");
        if (copy.tagName === "TBODY") {
          const table = document.createElement("table");
          table.className = "data";
          table.append(source.closest("table").tHead.cloneNode(true), copy);
          body.replaceChildren(table);
        } else {
          body.replaceChildren(copy);
        }
        panel.querySelector("a").href = cell.hash;
        panel.querySelector("h4").textContent = `Head ${cell.dataset.row}.${cell.dataset.column}`;
        panel.hidden = false;
        cells.forEach((one) => { if (one === cell) one.setAttribute("aria-current", "true"); else one.removeAttribute("aria-current"); });
        panel.focus({ preventScroll: true });
        panel.scrollIntoView({ block: "nearest" });
      });
    });
    const close = () => {
      panel.hidden = true;
      const cell = map.querySelector("a[aria-current]");
      if (cell) { cell.removeAttribute("aria-current"); cells.forEach((one) => { one.tabIndex = one === cell ? 0 : -1; }); cell.focus(); }
    };
    panel.querySelector("button").addEventListener("click", close);
    panel.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  });

  // One share of kept tokens at a time, on all of a figure's images.
  all(".kept-tokens").forEach((figure) => {
    const slide = figure.querySelector(".slide");
    const input = slide.querySelector("input");
    const said = slide.querySelector("output");
    const shares = JSON.parse(input.dataset.shares);
    const show = () => {
      all("[data-step]", figure).forEach((step) => step.classList.toggle("other", step.dataset.step !== input.value));
      said.textContent = shares[Number(input.value)];
      input.setAttribute("aria-valuetext", shares[Number(input.value)]);
    };
    slide.hidden = false;
    figure.classList.add("one-at-a-time");
    input.addEventListener("input", show);
    show();
  });
})();
