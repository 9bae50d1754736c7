"use strict";
const line = document.getElementById("line");
const patient = 25;  // seconds; the server says something every ten
let now = Number(document.body.dataset.now), at = performance.now();
let source, heard = null, why = "";

// The server's clock, by how long ago it told it; this machine's may be wrong.
const clock = () => now + (performance.now() - at) / 1000;

function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  for (const [unit, name, part, small] of
      [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]])
    if (whole >= unit)
      return `${Math.floor(whole / unit)} ${name} ${Math.floor(whole % unit / part)} ${small}`;
  return `${whole} s`;
}

function tick() {
  for (const each of document.querySelectorAll("[data-since], [data-until]")) {
    const { since, until } = each.dataset;
    const text = duration(since === undefined ? until - clock() : clock() - since);
    if (each.textContent !== text) each.textContent = text;
  }
}

// Make `parent`'s child number `index` what `tree` says, changing no more than has changed.
function patch(parent, index, tree) {
  const old = parent.childNodes[index];
  if (typeof tree === "string") {
    if (old && old.nodeType === 3) { if (old.data !== tree) old.data = tree; return; }
    place(parent, old, document.createTextNode(tree));
    return;
  }
  const [tag, attributes, ...children] = tree;
  let node = old;
  if (!node || node.nodeType !== 1 || node.localName !== tag)
    place(parent, old, node = document.createElement(tag));
  for (const name of node.getAttributeNames())
    if (!(name in attributes)) node.removeAttribute(name);
  for (const [name, value] of Object.entries(attributes))
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  if (tag === "time") return;
  children.forEach((child, i) => patch(node, i, child));
  while (node.childNodes.length > children.length) node.lastChild.remove();
}

function place(parent, old, node) {
  if (old) parent.replaceChild(node, old); else parent.append(node);
}

function say(text, lost) {
  if (line.textContent !== text) line.textContent = text;
  line.classList.toggle("lost", lost);
  document.body.classList.toggle("stale", lost);
}

function show(event) {
  const message = JSON.parse(event.data);
  now = message.now;
  at = heard = performance.now();
  why = "";
  if (message.page) {
    const main = document.querySelector("main");
    patch(main.parentNode, [...main.parentNode.childNodes].indexOf(main), message.page);
    document.title = message.title;
  }
  say("Live", false);
  tick();
}

function connect() {
  if (source) source.close();
  source = new EventSource("events" + location.search);
  source.onmessage = show;
  source.onerror = () => {
    why ||= "Connection lost";
    if (source.readyState === EventSource.CLOSED) {  // an answer, but not events
      why = "No live updates: the server has too many viewers, or asks to sign in (reload)";
      setTimeout(connect, 5000);
    }
    watch();
  };
}

function watch() {
  const silent = heard === null ? 0 : (performance.now() - heard) / 1000;
  if (silent > patient && !why) { why = "Connection lost"; connect(); }
  const age = heard === null ? "" : `; this was ${duration(silent)} ago. Trying again.`;
  if (why) say(why + age, true);
}

setInterval(() => { tick(); watch(); }, 1000);
connect();
