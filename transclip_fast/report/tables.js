"use strict";
/* The table of classes, and the most frequent changes. */

/* Classes. */
const COLUMNS = [["name", "class"], ["before", "zero-shot"], ["now", "now"], ["change", "change"], ["confidence", data.calibrated ? "how likely right, mean" : "mean confidence"]];
if (classes.accuracy) COLUMNS.push(["accuracyBefore", "zero-shot accuracy"], ["accuracy", "accuracy"]);
classes.change = classes.now.map((now, i) => now - classes.before[i]);
const byName = new Intl.Collator("en", { numeric: true });

function order() {
  const wanted = $("search").value.trim().toLowerCase();
  const values = classes[state.sort];
  const found = [...classes.id.keys()].filter((i) => folded[i].includes(wanted));
  const compare = state.sort === "name"
    ? (a, b) => byName.compare(values[a], values[b])
    : (a, b) => values[a] - values[b];
  const sign = state.down ? -1 : 1;
  return found.sort((a, b) => {
    if ((values[a] === null) !== (values[b] === null)) return values[a] === null ? 1 : -1;
    return sign * compare(a, b) || a - b;
  });
}

function cellsOf(i) {
  const change = classes.change[i];
  const texts = {
    before: number(classes.before[i]),
    now: number(classes.now[i]),
    change: change > 0 ? `+${number(change)}` : change < 0 ? `−${number(-change)}` : "",
  };
  return COLUMNS.map(([column]) =>
    column === "name"
      ? element("td", {}, isolated(classes.name[i]))
      : element("td", { textContent: texts[column] ?? percent(classes[column][i]) }),
  );
}

function list() {
  const found = order();
  const shown = found.slice(0, state.listed);
  document.querySelector("#table thead").replaceChildren(
    element("tr", {}, ...COLUMNS.map(([column, heading]) => {
      const button = element("button", { type: "button" }, heading);
      button.addEventListener("click", () => {
        state.down = state.sort === column ? !state.down : column !== "name";
        state.sort = column;
        list();
        document.querySelector("th[aria-sort] button").focus();
      });
      const sorted = state.sort === column ? { "aria-sort": state.down ? "descending" : "ascending" } : {};
      if (state.sort === column) button.append(state.down ? " ↓" : " ↑");
      return element("th", { attributes: { scope: "col", ...sorted } }, button);
    })),
  );
  document.querySelector("#table tbody").replaceChildren(...shown.map((i) => element("tr", {}, ...cellsOf(i))));
  $("listed").textContent = found.length > shown.length
    ? `${number(shown.length)} of ${number(found.length)} classes.`
    : `${number(found.length)} ${found.length === 1 ? "class" : "classes"}.`;
  $("more").hidden = found.length <= shown.length;
}

/* Flows. */
function flows() {
  const at = galleries.findIndex((gallery) => gallery.name === "changed");
  $("flows").hidden = !data.flows.length;
  $("flowlist").replaceChildren(...data.flows.map(([before, after, size]) => {
    const group = at < 0 ? -1 : galleries[at].groups.findIndex((one) => one.before === before && one.after === after);
    const button = element("button", { type: "button", disabled: group < 0 },
      element("span", {}, isolated(nameOf(before)), element("span", { className: "arrow", textContent: " → " }), isolated(nameOf(after))),
      element("span", { textContent: number(size) }));
    button.addEventListener("click", () => {
      show(at);
      $("gallery").children[group].scrollIntoView({ block: "center" });
    });
    return element("li", {}, button);
  }));
}

/* Start. */
$("search").addEventListener("input", () => {
  state.listed = LISTED;
  list();
});
$("more").addEventListener("click", () => {
  state.listed += 200;
  list();
});
list();
flows();
