"use strict";
/* The data of the page, and what all its parts share. */
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, images, galleries } = data;
const place = new Map(classes.id.map((k, i) => [k, i]));
const given = new Map(); // row -> class that a person gave
const past = []; // [row, class before or undefined], to undo
const OPTIONS = 8; // of a text
const LISTED = 30; // classes, at first
const state = { saved: true, gallery: 0, row: null, sort: "now", down: true, listed: LISTED };
const $ = (id) => document.getElementById(id);

/* An element with properties, attributes in `attributes`, and children that are nodes or texts. */
function element(tag, properties = {}, ...children) {
  const { attributes = {}, ...others } = properties;
  const node = Object.assign(document.createElement(tag), others);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const isolated = (text, className = "") =>
  element("bdi", { textContent: text, className, title: text });
const nameOf = (k) => (place.has(k) ? classes.name[place.get(k)] : `class ${k}`);
const labelOf = (k) => {
  const i = place.get(k);
  return i in classes.label ? classes.label[i] : classes.name[i];
};
const number = (value) => value.toLocaleString("en");
/* 100 % is all; 99.97 % is shown as 99.9 %. */
const percent = (value) => (value === null ? "" : value === 1 ? "100 %" : `${Math.min(100 * value, 99.9).toFixed(1)} %`);
/* In whole percent, where 100 % is all. */
const share = (value) => `${value === 1 ? 100 : Math.min(Math.round(100 * value), 99)} %`;
const keyOf = (row) => (images[row].key === null ? `row ${row}` : images[row].key);
const labelNow = (row) => (given.has(row) ? given.get(row) : images[row].label);

function picture(row) {
  const image = images[row];
  const box = element("span", { className: "picture" });
  if (image.picture) {
    box.append(element("img", { alt: keyOf(row), src: `data:image/jpeg;base64,${image.picture}` }));
  } else {
    box.append(isolated(keyOf(row)));
  }
  return box;
}
