"""Style and script of the live page; they are in the page, and its policy names their hashes."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --dim: #59636e; --line: #d1d9e0;
  --card: #f6f8fa; --link: #0550ae; --good: #1a7f37; --wait: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1;
  --line: #3d444d; --card: #151b23; --link: #79b8ff; --good: #56d364; --wait: #e3b341;
  --bad: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem; background: var(--back);
  color: var(--text); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: center;
  padding: .75rem 0; border-bottom: 1px solid var(--line); }
h1 { font-size: 1.25rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 1.75rem 0 .25rem; }
h2 a { font-size: .875rem; font-weight: normal; margin-left: .5rem; }
h3 { font-size: 1rem; margin: 0; }
h3 small { color: var(--dim); font-weight: normal; }
p { margin: .25rem 0; }
a { color: var(--link); }
#line { margin: 0; color: var(--dim); flex: 1 1 12rem; }
#line.lost { color: var(--bad); font-weight: bold; }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
input, button { font: inherit; color: inherit; background: var(--card); padding: .3rem .6rem;
  border: 1px solid var(--line); border-radius: .3rem; max-width: 100%; }
input { width: 11rem; }
.login input { width: 100%; }
main { display: flex; flex-direction: column; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .5rem 1.5rem;
  margin: 1rem 0 0; }
dt { color: var(--dim); font-size: .8125rem; }
dd { margin: 0; }
article { margin: .6rem 0; padding: .6rem .9rem; background: var(--card);
  border: 1px solid var(--line); border-left: .3rem solid var(--dim); border-radius: .3rem; }
article.waiting { border-left-color: var(--wait); }
article.running { border-left-color: var(--good); }
article.lost, article.trouble { border-left-color: var(--bad); }
.badge { display: inline-block; padding: 0 .45rem; border: 1px solid; border-radius: .3rem;
  font-size: .75rem; font-weight: bold; letter-spacing: .03em; color: var(--dim); }
.waiting .badge { color: var(--wait); }
.running .badge { color: var(--good); }
.lost .badge, .trouble .badge, .alert .badge { color: var(--bad); }
ul { margin: .25rem 0; padding-left: 1.25rem; }
.more, .note { color: var(--dim); font-size: .875rem; }
.note { margin-top: 1rem; }
progress { width: 100%; height: .5rem; accent-color: var(--wait); }
table { border-collapse: collapse; margin-top: .75rem; width: 100%; font-size: .9375rem; }
caption { text-align: left; font-weight: bold; padding-bottom: .25rem; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: normal; font-size: .8125rem; }
time { font-variant-numeric: tabular-nums; white-space: nowrap; }
body.stale main { opacity: .6; }
.login { max-width: 24rem; margin: 15vh auto 0; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr 1fr; }
  .server { order: 1; }  /* what is wrong comes first where there is no room for both */
  .wide table, .wide tbody, .wide tr, .wide td, .wide caption { display: block; }
  .wide thead { display: none; }
  .wide tr { padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .wide td { display: inline; border: 0; padding-right: .5rem; }
  .wide td:first-child { display: block; font-weight: bold; }
}
"""

SCRIPT = """
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
"""
