"use strict";
/* Galleries, the selected image, and corrections. */

/* Galleries. */
function card(row) {
  const image = images[row];
  const node = element("button", { className: "card", type: "button", attributes: { "data-row": row } });
  node.addEventListener("click", () => select(row, matchMedia("(pointer: fine)").matches));
  fill(node, row);
  return node;
}

function fill(node, row) {
  const image = images[row];
  const box = picture(row);
  const label = labelNow(row);
  let tone = "";
  if (given.has(row)) {
    tone = "given";
    box.append(element("span", { className: "mark", textContent: "✓" }));
  } else if (image.known) {
    box.append(element("span", { className: "mark", textContent: "known" }));
  } else if ("truth" in image && image.truth !== label) {
    tone = "wrong";
  }
  const earlier = "earlier" in image && image.earlier !== label ? image.earlier : image.zeroShot;
  const before = given.has(row) ? image.label : earlier;
  // The confidence is of the label before a correction.
  const facts = given.has(row) ? [] : [share(image.confidence)];
  if (before !== label) facts.push(`was ${nameOf(before)}`);
  node.replaceChildren(
    box,
    isolated(nameOf(label), `name ${tone}`),
    isolated(facts.join(", "), "was"),
  );
}

function refresh(row) {
  for (const node of document.querySelectorAll(`.card[data-row="${row}"]`)) fill(node, row);
}

function title(group) {
  if (group.after === null) return null;
  const size = group.rows.length < group.size ? ` ${group.rows.length} of ${number(group.size)}` : ` ${number(group.size)}`;
  const parts = group.before === null ? [] : [isolated(nameOf(group.before)), element("span", { className: "arrow", textContent: " → " })];
  return element("h3", {}, ...parts, isolated(nameOf(group.after)), element("small", { textContent: size }));
}

function groupOf(group) {
  const cards = element("div", { className: "cards" }, ...group.rows.map(card));
  const node = element("div", { className: "group" }, title(group), cards);
  node.style.setProperty("--images", group.rows.length);
  return node;
}

function show(index) {
  state.gallery = index;
  const gallery = galleries[index];
  [...$("tabs").children].forEach((tab, i) => {
    tab.setAttribute("aria-selected", i === index);
    tab.tabIndex = i === index ? 0 : -1;
  });
  $("about").textContent = gallery.text;
  $("gallery").replaceChildren(...gallery.groups.map(groupOf));
  mark();
}

const rowsShown = () => galleries[state.gallery].groups.flatMap((group) => group.rows);

function mark() {
  for (const node of document.querySelectorAll(".card")) {
    node.setAttribute("aria-current", Number(node.dataset.row) === state.row);
  }
}

function select(row, typing) {
  state.row = row;
  panel(row);
  mark();
  const node = document.querySelector(`.card[data-row="${row}"]`);
  if (node) node.scrollIntoView({ block: "nearest" });
  const input = $("right");
  if (typing && input) input.focus({ preventScroll: true });
  else if (node) node.focus({ preventScroll: true });
}

function move(step, typing) {
  const rows = rowsShown();
  const at = rows.indexOf(state.row);
  const next = at < 0 ? 0 : at + step;
  if (next in rows) select(rows[next], typing);
  else if (typing) select(state.row, typing);
}

function unselect() {
  state.row = null;
  $("panel").hidden = true;
  mark();
}

/* The selected image. */
function panel(row) {
  const image = images[row];
  const facts = [
    element("p", {}, isolated(nameOf(labelNow(row)), `name ${given.has(row) ? "given" : ""}`)),
    element("p", {}, isolated(keyOf(row))),
  ];
  if (data.calibrated && !given.has(row)) facts.push(element("p", { textContent: `about ${share(image.confidence)} likely right` }));
  if (given.has(row)) facts.push(element("p", {}, "you corrected ", isolated(nameOf(image.label))));
  else if (image.known) facts.push(element("p", { textContent: "its class was given" }));
  if ("earlier" in image && image.earlier !== image.label) {
    facts.push(element("p", {}, "before the corrections ", isolated(nameOf(image.earlier))));
  }
  if ("truth" in image) {
    const tone = image.truth === labelNow(row) ? "" : "wrong";
    facts.push(element("p", {}, "true label ", isolated(nameOf(image.truth), tone)));
  }
  const buttons = [["‹", "Previous image", () => move(-1, false)], ["›", "Next image", () => move(1, false)], ["✕", "Close", unselect]];
  const tools = element("div", { className: "tools" }, ...buttons.map(([textContent, label, act]) => {
    const button = element("button", { type: "button", textContent, attributes: { "aria-label": label } });
    button.addEventListener("click", act);
    return button;
  }));
  const text = image.text ?? [[image.zeroShot, image.zeroShotConfidence]];
  $("panel").replaceChildren(
    tools,
    element("div", { className: "top" }, picture(row), element("div", { className: "facts2" }, ...facts)),
    choose(row),
    said("The text says", text),
    said("The mixture says", image.mixture),
    neighbors(image.neighbors),
    said("Together (confidence, too sure of itself)", image.joint),
  );
  $("panel").hidden = false;
  $("panel").scrollTop = 0;
}

function said(heading, opinion) {
  if (!opinion || !opinion.length) return element("div");
  const lines = opinion.flatMap(([k, p]) => [
    element("span", {}, isolated(nameOf(k))),
    element("meter", { value: p, max: 1, attributes: { "aria-label": percent(p) } }),
    element("span", { className: "percent", textContent: percent(p) }),
  ]);
  return element("div", {}, element("h3", { textContent: heading }), element("div", { className: "say" }, ...lines));
}

function neighbors(rows) {
  if (!rows || !rows.length) return element("div");
  const list = rows.map((row) =>
    element("figure", { title: keyOf(row) }, picture(row), element("figcaption", {}, isolated(nameOf(labelNow(row))))),
  );
  return element("div", {}, element("h3", { textContent: "Its neighbours say" }), element("div", { className: "near" }, ...list));
}

/* The classes that a text may mean, best first: names that start with it, words that do, others. */
const folded = classes.name.map((name) => name.toLowerCase());
function matching(text) {
  const wanted = text.trim().toLowerCase();
  const ranks = [[], [], [], []];
  if (!wanted) return [];
  folded.forEach((name, i) => {
    const at = name.indexOf(wanted);
    if (at < 0 || labelOf(classes.id[i]) === null) return;
    const rank = name === wanted ? 0 : at === 0 ? 1 : /[\s_\-/]/.test(name[at - 1]) ? 2 : 3;
    if (ranks[rank].length < OPTIONS) ranks[rank].push(classes.id[i]);
  });
  return ranks.flat().slice(0, OPTIONS);
}

function choose(row) {
  const current = labelNow(row);
  const input = element("input", {
    id: "right",
    type: "text",
    autocomplete: "off",
    spellcheck: false,
    placeholder: `Right class; Enter keeps ${nameOf(current)}`,
    attributes: {
      "aria-label": "Right class", role: "combobox", "aria-expanded": "false",
      "aria-controls": "options", "aria-autocomplete": "list", enterkeyhint: "done",
    },
  });
  const list = element("ul", { className: "options", id: "options", hidden: true, attributes: { role: "listbox" } });
  let options = [];
  let at = 0;
  function render() {
    options = matching(input.value);
    at = Math.min(at, Math.max(options.length - 1, 0));
    list.replaceChildren(
      ...options.map((k, i) => {
        const item = element("li", { id: `option${i}`, attributes: { role: "option", "aria-selected": i === at } }, isolated(nameOf(k)));
        item.addEventListener("pointerdown", (event) => {
          event.preventDefault();
          take(k);
        });
        return item;
      }),
    );
    list.hidden = !input.value.trim();
    if (!list.hidden && !options.length) {
      list.append(element("li", { textContent: "no such class", attributes: { "aria-disabled": "true" } }));
    }
    input.setAttribute("aria-expanded", !list.hidden);
    if (options.length) input.setAttribute("aria-activedescendant", `option${at}`);
    else input.removeAttribute("aria-activedescendant");
  }
  function take(k) {
    give(row, k);
    move(1, true);
  }
  input.addEventListener("input", () => {
    at = 0;
    render();
  });
  input.addEventListener("keydown", (event) => {
    const empty = !input.value;
    const step = { ArrowDown: 1, ArrowUp: -1, ...(empty ? { ArrowRight: 1, ArrowLeft: -1 } : {}) }[event.key];
    if (event.isComposing) return;
    if (step && empty) move(step, true);
    else if (step && options.length) {
      at = (at + step + options.length) % options.length;
      render();
    } else if (event.key === "Enter" && empty) take(current);
    else if (event.key === "Enter" && options.length) take(options[at]);
    else if (event.key === "Escape" && !empty) {
      input.value = "";
      render();
    } else if (event.key === "Escape") select(row, false);
    else if (event.key === "z" && (event.ctrlKey || event.metaKey) && empty) undo();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const hint = element("p", { className: "hint keys" });
  for (const [key, does] of [["Enter", "takes and goes on,"], ["↑ ↓", "move;"], ["Esc", "then"], ["j k", "move,"], ["u", "undoes"]]) {
    hint.append(element("kbd", { textContent: key }), ` ${does} `);
  }
  return element("div", { className: "choose" }, input, list, hint);
}

/* Corrections. */
function give(row, k) {
  if (labelOf(k) === null || labelOf(k) === undefined) return;
  past.push([row, given.get(row)]);
  given.set(row, k);
  changed(row);
}

function undo() {
  if (!past.length) return;
  const [row, k] = past.pop();
  if (k === undefined) given.delete(row);
  else given.set(row, k);
  changed(row);
  const next = rowsShown().includes(row) ? row : state.row; // the panel may name the row, too
  if (next !== null) select(next, document.activeElement === $("right"));
}

function changed(row) {
  state.saved = false;
  keep();
  refresh(row);
  mark();
  count();
}

function count() {
  $("bar").hidden = !past.length && !given.size;
  $("undo").disabled = !past.length;
  $("save").disabled = !given.size;
  $("count").textContent = given.size === 1 ? "1 correction" : `${number(given.size)} corrections`;
  $("then").hidden = true;
}

/* Corrections outlast a reload, in the browser's storage. Other pages write there, too, so that
   nothing of it is taken but rows and classes of this page. */
const KEPT = `transclip-fast corrections of ${data.identity}`;
function keep() {
  try {
    if (given.size) localStorage.setItem(KEPT, JSON.stringify({ saved: state.saved, given: [...given] }));
    else localStorage.removeItem(KEPT);
  } catch {
    // Without storage corrections are kept until the page is closed.
  }
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT));
    for (const [row, k] of kept.given) {
      if (!Number.isInteger(row) || !Object.hasOwn(images, row) || !place.has(k) || labelOf(k) === null) continue;
      if (!given.has(row)) past.push([row, undefined]);
      given.set(row, k);
    }
    state.saved = kept.saved === true;
  } catch {
    // Nothing is kept, or something else.
  }
  if (given.size) count();
}

const cell = (text) => {
  const safe = data.guarded.includes(text[0]) ? `'${text}` : text;
  return `"${safe.replaceAll('"', '""')}"`;
};

function table() {
  const byRow = data.keyColumn === "row";
  const lines = [[data.keyColumn, "label"]];
  for (const [row, k] of given) lines.push([byRow ? String(row) : images[row].key, labelOf(k)]);
  return lines.map((line) => `${line.map(cell).join(",")}\r\n`).join("");
}

function save() {
  const url = URL.createObjectURL(new Blob([table()], { type: "text/csv;charset=utf-8" }));
  const link = element("a", { href: url, download: "corrections.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  state.saved = true;
  keep();
  const [solve, look] = data.commands;
  $("command").textContent = solve;
  $("look").textContent = look;
  $("then").hidden = !solve;
}

/* Start. */
galleries.forEach((gallery, i) => {
  const count = gallery.groups.reduce((sum, group) => sum + group.rows.length, 0);
  const size = gallery.size > count ? `${number(count)} of ${number(gallery.size)}` : number(count);
  const tab = element("button", { type: "button", attributes: { role: "tab" } }, gallery.title, element("small", { textContent: size }));
  tab.addEventListener("click", () => show(i));
  $("tabs").append(tab);
});
$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  show((state.gallery + step + galleries.length) % galleries.length);
  $("tabs").children[state.gallery].focus();
  event.stopPropagation();
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, #tabs")) return;
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "u") undo();
  else if (event.key === "j" || (state.row !== null && ["ArrowRight", "ArrowDown"].includes(event.key))) move(1, false);
  else if (event.key === "k" || (state.row !== null && ["ArrowLeft", "ArrowUp"].includes(event.key))) move(-1, false);
  else if (event.key === "Enter" && state.row !== null && event.target.closest(".card, body") && !event.target.closest("button:not(.card)")) $("right").focus();
  else if (event.key === "Escape" && state.row !== null) unselect();
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => {
  if (given.size && !state.saved) event.preventDefault();
});
$("undo").addEventListener("click", undo);
$("save").addEventListener("click", save);
recall();
if (galleries.length) show(0);
else $("images").hidden = true;
