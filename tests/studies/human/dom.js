// As much of a browser as the page of tasks uses, so that its script runs where there is none (test_page.py runs it in a
// real one too, where there is one). The page's elements with an id are given as IDS: [[id, tag, hidden], …].
"use strict";
const store = {}; // of this browser; survives a reload, which is a second run of the page's script
const saved = [];
class Element {
  constructor(tag) { Object.assign(this, { tag, hidden: false, children: [], listeners: {}, value: "", textContent: "", checked: false }); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); }
  dispatch(kind, parts = {}) {
    const event = { target: this, preventDefault() {}, ...parts };
    for (const listener of this.listeners[kind] ?? []) listener(event);
  }
  focus() { document.activeElement = this; }
  requestSubmit() { this.dispatch("submit"); }
  click() { if (this.download) saved.push({ name: this.download, text: this.href }); else this.dispatch("click"); }
  inside() { return [this, ...this.children.flatMap((child) => child.inside?.() ?? [])]; }
}
const document = Object.assign(new Element("document"), {
  getElementById: (id) => elements[id] ?? (() => { throw new Error("no element " + id); })(),
  createElement: (tag) => new Element(tag),
  querySelectorAll: (selector) => {
    if (!selector.startsWith("input[name=choice]")) throw new Error("selector " + selector);
    const found = elements.shown.inside().filter((node) => node.tag === "input" && node.name === "choice");
    return selector.endsWith(":checked") ? found.filter((node) => node.checked) : found;
  },
  querySelector: (selector) => document.querySelectorAll(selector)[0] ?? null,
});
const localStorage = {
  getItem: (key) => store[key] ?? null,
  setItem: (key, value) => { store[key] = String(value); },
  removeItem: (key) => { delete store[key]; },
};
const location = { reload: () => { open(); } };
const Blob = class { constructor(parts) { this.text = parts.join(""); } };
const URL = { createObjectURL: (blob) => blob.text, revokeObjectURL: () => {} };
const elements = {};
const open = () => { // the page as it is loaded
  document.listeners = {};
  for (const [id, tag, hidden] of IDS) elements[id] = Object.assign(new Element(tag), { id, hidden });
  elements.content.textContent = CONTENT;
  script();
};
const press = (key) => {
  const target = document.activeElement ?? document;
  document.dispatch("keydown", { key, target });
  if (key === "Enter" && target.id === "participant") elements.who.dispatch("submit");
  if (key === "Enter" && target.id === "name") elements.task.dispatch("submit");
  if (key === "Enter" && target.id === "save") target.click();
};
// A radio button that is chosen takes its group's choice from the others.
const choose = (key) => { for (const node of document.querySelectorAll("input[name=choice]")) node.checked = false; press(key); };
