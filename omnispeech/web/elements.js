/** Elements are made here, from names and texts: no markup is ever read from a string. */

const SVG = "http://www.w3.org/2000/svg";

/** element("p", {class: "words"}, "text", child, ...) */
export function element(name, attributes = {}, ...children) {
  return furnished(document.createElement(name), attributes, children);
}

export function drawing(name, attributes = {}, ...children) {
  return furnished(document.createElementNS(SVG, name), attributes, children);
}

/** One of the symbols that index.html defines. */
export function icon(name) {
  return drawing("svg", { class: "icon", "aria-hidden": "true" }, use(name));
}

export function button(label, action, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", action);
  return made;
}

/** What is in a field. Half a character, of which JSON makes nothing, stands for an unknown one. */
export const written = (field) => field.value.trim().replace(/\p{Surrogate}/gu, "\ufffd");

const use = (name) => drawing("use", { href: `#icon-${name}` });

function furnished(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
