"use strict";
// State lives in the address (#...), everything on the page follows from it: see `render`.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const OURS = "concept_trak", GAP = 4, LINES = 96; // px between cards; under a picture
const BINS = 60, TOP = 10;

// --- what is on the page: text of a script element, once the parser has come to it
const bytes = (id) => {
  const element = $(id);
  return element && Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
};
const cache = new Map();
function kept(key, make) {
  if (!cache.has(key)) {
    const made = make();
    if (made === null) return null;
    cache.set(key, made);
  }
  return cache.get(key);
}

// --- state
const defaults = { a: "", c: 0, m: OURS, d: -1, f: "", s: "high", c2: -1, m2: OURS, v: 0 };
const state = { ...defaults, labels: {} };
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, defaults, { labels: {} });
  for (const [key, value] of given) {
    if (key.startsWith("l.")) state.labels[key.slice(2)] = value;
    else if (key in defaults) state[key] = typeof defaults[key] === "number" ? Number(value) : value;
  }
}
function writeAddress() {
  const out = new URLSearchParams();
  for (const key of Object.keys(defaults)) if (state[key] !== defaults[key]) out.set(key, state[key]);
  for (const [key, value] of Object.entries(state.labels)) if (value) out.set("l." + key, value);
  history.replaceState(null, "", "#" + out);
}
const answer = () => data.answers.find((a) => a.id === state.a) || data.answers[0];
const dataset = () => data.datasets[answer().dataset];
const damping = () => (state.d in answer().dampings ? state.d : answer().fixed);

// --- numbers
function scoresOf(concept, method) { // Float32Array [N], or null while it is not there yet
  const about = concept.methods[method];
  if (!about) return null;
  const all = kept(about.id, () => {
    const raw = bytes(about.id);
    return raw && new Float32Array(raw.buffer);
  });
  if (!all) return null;
  const n = all.length / about.rows, row = about.rows > 1 ? damping() : 0;
  return all.subarray(row * n, (row + 1) * n);
}
function ranked(concept, method) { // {scores, order, rank, place}: place is that of score in sorted order
  const scores = scoresOf(concept, method);
  if (!scores) return null;
  return kept(`rank ${concept.methods[method].id} ${damping()}`, () => {
    const order = Uint32Array.from(scores, (_, i) => i).sort((x, y) => scores[y] - scores[x] || x - y);
    const rank = new Uint32Array(order.length);
    order.forEach((i, at) => { rank[i] = at + 1; });
    const sorted = Float32Array.from(scores).sort();
    return { scores, order, rank, sorted };
  });
}
function percentile(found, i) {
  let low = 0, high = found.sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (found.sorted[middle] < found.scores[i]) low = middle + 1; else high = middle;
  }
  return (100 * low) / found.sorted.length;
}
function correlation(one, two) { // of ranks; ties, which only methods without damping have, by index
  const n = one.rank.length;
  let sum = 0;
  for (let i = 0; i < n; i++) sum += (one.rank[i] - two.rank[i]) ** 2;
  return n > 1 ? 1 - (6 * sum) / (n * (n * n - 1)) : 1;
}
const number = (x) => x.toExponential(2).replaceAll("-", "−").replace("e+0", "");
const thousands = (x) => x.toLocaleString("en");

// --- which pictures, in which order
function shownIn(pane) {
  const set = dataset(), words = state.f.toLowerCase(), low = kept("low " + answer().dataset, () =>
    set.captions.map((caption, i) => (caption + " " + decodeURIComponent(set.files[i])).toLowerCase()));
  const wanted = Object.entries(state.labels).filter(([name, v]) => v && set.labels[name])
    .map(([name, v]) => [set.labels[name].of, set.labels[name].values.indexOf(v)]);
  const passes = (i) => (!words || low[i].includes(words)) && wanted.every(([of, v]) => of[i] === v);
  const list = Array.from(pane.found.order).filter(passes);
  if (state.s === "low") list.reverse();
  if (state.s === "caption") list.sort((x, y) => (set.captions[x] < set.captions[y] ? -1 : 1));
  if (state.s === "unfit" && set.fit) list.sort((x, y) => set.fit[x] - set.fit[y]);
  if (state.s === "apart" && panes.length > 1 && panes.every((p) => p.found)) {
    const gap = (i) => Math.abs(panes[0].found.rank[i] - panes[1].found.rank[i]);
    list.sort((x, y) => gap(y) - gap(x));
  }
  return list;
}

// --- small helpers that make elements; text is always text
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value: String(value) }, text)));
  select.value = String(chosen);
}
function sheetOf(index) { // blob: URL of the sheet that holds a picture, null while it is not there yet
  const set = dataset(), id = `p${answer().dataset}-${Math.floor(index / set.across ** 2)}`;
  return kept(id, () => {
    const raw = bytes(id);
    return raw && URL.createObjectURL(new Blob([raw], { type: "image/webp" }));
  });
}
function paint(thumb, index, side) {
  const set = dataset(), url = sheetOf(index), at = index % set.across ** 2;
  thumb.style.width = thumb.style.height = side + "px";
  if (!url) return;
  thumb.style.imageRendering = set.side <= 32 ? "pixelated" : "auto";
  thumb.style.backgroundImage = `url("${url}")`;
  thumb.style.backgroundSize = `${set.across * side}px auto`;
  thumb.style.backgroundPosition = `${-(at % set.across) * side}px ${-Math.floor(at / set.across) * side}px`;
}

// --- a pane: one ranking
let panes = [];
class Pane {
  constructor(number) {
    this.number = number;
    this.active = 0;
    this.title = element("h2");
    this.concept = element("select", { "aria-label": "concept" });
    this.method = element("select", { "aria-label": "method" });
    this.ends = ["top", "end"].map((end) => element("button", {}, end === "top" ? "Highest" : "Lowest"));
    this.says = element("p", { class: "says" });
    this.plot = element("div", { class: "plot" });
    this.space = element("div", { class: "space" });
    this.scroller = element("div", { class: "scroller", role: "group" }, this.space);
    const head = element("div", { class: "pane-head" }, this.title,
      element("label", {}, element("span", {}, "Concept"), this.concept),
      element("label", {}, element("span", {}, "Method"), this.method), ...this.ends);
    this.root = element("section", { class: `pane c${number}` }, head, this.says, this.plot, this.scroller);
    this.concept.onchange = () => this.set("c", Number(this.concept.value));
    this.method.onchange = () => this.set("m", this.method.value);
    this.ends[0].onclick = () => this.go(state.s === "low" ? this.list.length - 1 : 0);
    this.ends[1].onclick = () => this.go(state.s === "low" ? 0 : this.list.length - 1);
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    this.scroller.addEventListener("keydown", (event) => this.key(event));
  }
  set(name, value) { state[name + (this.number ? "2" : "")] = value; change(); }
  render() {
    const a = answer(), c = this.number ? state.c2 : state.c, m = this.number ? state.m2 : state.m;
    const about = a.concepts[c] || a.concepts[0];
    this.about = about;
    this.name = about.methods[m] ? m : OURS;
    options(this.concept, a.concepts.map((x, i) => [i, x.target]), a.concepts.indexOf(about));
    options(this.method, Object.keys(about.methods).map((x) => [x, x]), this.name);
    const several = Object.keys(about.methods).length > 1;
    this.title.replaceChildren(`“${about.target}”`, several ? element("small", {}, ` by ${this.name}`) : "");
    this.scroller.setAttribute("aria-label", `training images by their score for ${about.target}, ${this.name}`);
    this.found = ranked(about, this.name);
    this.relevant = kept(`relevant ${a.id} ${a.concepts.indexOf(about)}`, () => new Set(about.relevant || []));
  }
  fill() {
    if (!this.found) { this.says.textContent = "loading the scores …"; return; }
    this.list = shownIn(this);
    this.active = Math.min(this.active, Math.max(0, this.list.length - 1));
    const n = this.found.order.length, known = this.about.relevant !== null, filtered = this.list.length < n;
    let told = `${thousands(this.list.length)} of ${thousands(n)} training images${filtered ? " pass the filter" : ""}.`;
    if (known && this.relevant.size) {
      const hits = Array.from(this.found.order.slice(0, TOP)).filter((i) => this.relevant.has(i)).length;
      const rate = hits / Math.min(TOP, this.relevant.size);
      told += ` Of the ten highest scores ${hits} carry the concept by their labels (Recall@10 ${rate.toFixed(2)}).`;
    }
    this.says.textContent = told;
    this.plot.replaceChildren(histogram(this));
    this.scroller.querySelector(".none")?.remove();
    if (!this.list.length) this.scroller.append(element("p", { class: "none" }, "No picture passes the filter."));
    this.draw(true);
  }
  layout() {
    const width = this.scroller.clientWidth, least = width < 480 ? 100 : 118;
    this.columns = Math.max(2, Math.floor(width / least));
    this.width = Math.floor(width / this.columns);
    this.side = this.width - GAP - 14;
    this.height = this.side + LINES;
  }
  draw(again) { // only the rows in sight, and one more on each side
    if (!this.found || !this.list) return;
    this.layout();
    this.space.style.height = Math.ceil(this.list.length / this.columns) * this.height + "px";
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / this.height) - 1);
    const last = Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / this.height) + 1;
    const key = `${first} ${last} ${this.columns}`;
    if (!again && key === this.drawn) return;
    this.drawn = key;
    const focused = this.space.contains(document.activeElement);
    const places = this.list.slice(first * this.columns, last * this.columns);
    this.space.replaceChildren(...places.map((i, at) => this.card(i, first * this.columns + at)));
    if (focused) this.space.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
  }
  card(i, at) {
    const set = dataset(), thumb = element("span", { class: "thumb" }), hit = this.relevant.has(i);
    const rank = `${thousands(this.found.rank[i])}`, other = panes[1 - this.number];
    const there = panes.length > 1 && other.found ? `there ${thousands(other.found.rank[i])}` : "";
    const mark = there || (this.about.relevant === null ? "" : hit ? "✓ match" : "✗ no match");
    const unfit = set.fit && set.fit[i] < 0.5 ? "⚠ " : "";
    const made = element("button", { class: "card" + (hit ? " hit" : "") + (i === lit ? " on" : ""),
      "data-index": String(i), "data-at": String(at), tabIndex: at === this.active ? 0 : -1,
      "aria-label": `rank ${rank}: ${set.captions[i]}` }, thumb,
      element("span", { class: "line" }, element("b", {}, rank), element("span", {}, mark)),
      element("span", { class: "line" }, element("span", {}, number(this.found.scores[i])),
        element("span", {}, `${percentile(this.found, i).toFixed(1)} %`)),
      element("span", { class: "words" }, unfit + set.captions[i]));
    paint(thumb, i, this.side);
    Object.assign(made.style, { left: (at % this.columns) * this.width + "px", width: this.width - GAP + "px",
      top: Math.floor(at / this.columns) * this.height + "px", height: this.height - GAP + "px" });
    made.onclick = () => { this.active = at; show(i); };
    made.onmouseenter = () => light(i);
    made.onfocus = () => light(i);
    return made;
  }
  go(at) { // make a card the active one and bring it into sight
    if (!this.list || !this.list.length) return;
    this.active = Math.max(0, Math.min(this.list.length - 1, at));
    this.layout();
    const top = Math.floor(this.active / this.columns) * this.height;
    const view = this.scroller;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + this.height > view.scrollTop + view.clientHeight) view.scrollTop = top + this.height - view.clientHeight;
    this.draw(true);
    this.space.querySelector(`[data-at="${this.active}"]`)?.focus({ preventScroll: true });
  }
  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns }[event.key];
    const to = step ? this.active + step : { Home: 0, End: this.list.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.go(to);
  }
}
let lit = -1; // the picture under the pointer or the focus, in both panes
function light(i) {
  lit = i;
  for (const card of document.querySelectorAll(".card")) card.classList.toggle("on", Number(card.dataset.index) === i);
}
function histogram(pane) {
  const { scores, sorted } = pane.found, low = Math.min(0, sorted[0]), high = Math.max(0, sorted[sorted.length - 1]);
  const span = high - low || 1, all = new Uint32Array(BINS), hits = new Uint32Array(BINS);
  scores.forEach((x, i) => {
    const bin = Math.min(BINS - 1, Math.floor(((x - low) / span) * BINS));
    all[bin]++;
    if (pane.relevant.has(i)) hits[bin]++;
  });
  const most = Math.max(...all), bars = (counts) => Array.from(counts, (n, i) =>
    n ? `M${i * 8 + 0.5} 64v${(-64 * n / most).toFixed(1)}h7V64z` : "").join("");
  const rug = [...pane.relevant].map((i) => `M${(((scores[i] - low) / span) * 480).toFixed(1)} 67v7`).join("");
  const svg = `<svg viewBox="0 0 480 76" preserveAspectRatio="none" role="img"><path class="all" d="${bars(all)}"/>` +
    `<path class="hit" d="${bars(hits)}"/><path class="rug" d="${rug}"/><path class="zero" d="M${((-low / span) * 480).toFixed(1)} 0v76"/></svg>`;
  const box = element("div"), [from, to] = [low, high].map((x) => (x ? number(x) : "0"));
  box.innerHTML = svg; // numbers alone
  const n = thousands(scores.length);
  box.firstChild.setAttribute("aria-label", `histogram of ${n} scores`);
  box.append(element("p", { class: "axis" }, element("span", {}, from), element("span", {}, to)), element("p",
    { class: "key" }, `How many of the ${n} images have which score` + (pane.about.relevant === null ? "" :
    `; coloured: the ${thousands(pane.relevant.size)} that carry the concept`) + "; dashed: 0."));
  return box;
}

// --- one picture in full
function show(i) {
  const set = dataset(), a = answer(), dialog = $("detail"), rows = [];
  paint(dialog.querySelector(".thumb"), i, Math.min(256, set.side * Math.max(1, Math.floor(256 / set.side))));
  $("detail-caption").textContent = set.captions[i];
  const fit = set.fit ? ` · fit of the caption ${set.fit[i].toFixed(2)}` : "";
  $("detail-file").replaceChildren(element("a", { href: `${set.base}/${set.files[i]}` },
    decodeURIComponent(set.files[i])), fit);
  for (const concept of a.concepts) for (const method of Object.keys(concept.methods)) {
    const found = ranked(concept, method);
    if (found) rows.push([concept.target, method, thousands(found.rank[i]), number(found.scores[i]),
      percentile(found, i).toFixed(1) + " %"]);
  }
  $("detail-ranks").replaceChildren(...rows.map((row) => element("tr", {}, ...row.map((x) => element("td", {}, x)))));
  dialog.showModal();
}
$("detail").querySelector(".close").onclick = () => $("detail").close();
$("detail").onclick = (event) => { if (event.target === $("detail")) $("detail").close(); };

// --- the whole page
function describe() {
  const a = answer(), seen = { true: " The model never saw this combination.", false: " The model was trained on it." };
  const own = a.settings.length ? ` Settings of its own: ${a.settings.join(" ")}.` : "";
  const link = element("a", { href: a.page }, "report");
  $("about").replaceChildren(link, ` of ${a.made}, seed ${a.seed}.${seen[a.unseen] || ""}${own}`,
    ...a.warnings.map((text) => ` Warning: ${text}.`));
  $("query").src = a.query;
  $("query").alt = `the query picture: ${a.prompt}`;
  options($("answer"), data.answers.map((x) => [x.id, x.prompt + (x.settings.length ? ` (${x.settings.join(" ")})` : "") +
    (x.seed ? ` (seed ${x.seed})` : "")]), a.id);
}
function tools() {
  const a = answer(), set = dataset(), at = damping();
  $("damping").max = a.dampings.length - 1;
  $("damping").value = at;
  const told = `DAMPING=${a.dampings[at]}`;
  $("damping").setAttribute("aria-valuetext", told);
  $("damping").setAttribute("aria-labelledby", "damping-label");
  $("damping-value").textContent = told + (at === a.fixed ? " (fixed)" : "");
  if ($("filter").value !== state.f) $("filter").value = state.f;
  $("sort").value = state.s;
  for (const option of $("sort").options) {
    option.hidden = option.disabled = (option.value === "apart" && state.c2 < 0) || (option.value === "unfit" && !set.fit);
  }
  $("compare").setAttribute("aria-pressed", String(state.c2 >= 0));
  $("labels").replaceChildren(...Object.entries(set.labels).map(([name, label]) => {
    const select = element("select", { "data-label": name });
    options(select, [["", "all"], ...[...label.values].sort().map((v) => [v, v])], state.labels[name] || "");
    select.onchange = () => { state.labels[name] = select.value; change(); };
    return element("label", {}, element("span", {}, name), select);
  }));
}
function agreement() {
  const [one, two] = panes.map((pane) => pane.found);
  if (!one || !two) { $("agreement").textContent = ""; return; }
  const top = new Set(one.order.slice(0, TOP)), both = Array.from(two.order.slice(0, TOP)).filter((i) => top.has(i)).length;
  $("agreement").textContent = `Both rankings: rank correlation ${correlation(one, two).toFixed(2).replace("-", "−")} ` +
    `over all images; ${both} of the ten highest are the same. “there” is an image's rank on the other side.`;
}
function render() {
  const count = state.c2 >= 0 ? 2 : 1;
  if (panes.length !== count) {
    panes = panes.slice(0, count);
    while (panes.length < count) panes.push(new Pane(panes.length));
    $("panes").replaceChildren(...panes.map((pane) => pane.root));
    $("panes").className = "panes" + (count > 1 ? " two" : "");
  }
  describe();
  panes.forEach((pane) => pane.render());
  tools();
  panes.forEach((pane) => pane.fill());
  agreement();
}
function change() { writeAddress(); render(); }
function compare() {
  const a = answer(), methods = Object.keys(a.concepts[0].methods);
  if (state.c2 >= 0) { state.c2 = -1; if (state.s === "apart") state.s = "high"; }
  else {
    state.c2 = methods.length > 1 ? state.c : Math.min(state.c + 1, a.concepts.length - 1);
    state.m2 = methods.find((m) => m !== state.m) || state.m;
  }
  change();
}
function step(by) {
  state.d = Math.max(0, Math.min(answer().dampings.length - 1, damping() + by));
  change();
}
$("answer").onchange = () => {
  Object.assign(state, { ...defaults, a: $("answer").value, f: state.f, s: state.s, c2: state.c2 });
  panes.forEach((pane) => { pane.active = 0; pane.scroller.scrollTop = 0; });
  change();
};
$("damping").oninput = () => { state.d = Number($("damping").value); change(); };
$("filter").oninput = () => { state.f = $("filter").value; panes.forEach((p) => { p.scroller.scrollTop = 0; p.active = 0; }); change(); };
$("sort").onchange = () => { state.s = $("sort").value; panes.forEach((p) => { p.scroller.scrollTop = 0; p.active = 0; }); change(); };
$("compare").onclick = compare;
$("reset").onclick = () => { const a = state.a; Object.assign(state, defaults, { labels: {}, a }); change(); };
document.addEventListener("keydown", (event) => {
  const typing = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey || $("detail").open) return;
  if (event.target === $("filter") && /^(Enter|Escape)$/.test(event.key)) {
    event.preventDefault(); // or the card that gets the focus would be pressed by the same key
    panes[0].go(0);
  }
  if (typing) return;
  const act = { "/": () => $("filter").focus(), "[": () => step(-1), "]": () => step(1), c: compare,
    s: () => { state.s = state.s === "low" ? "high" : "low"; change(); } }[event.key];
  if (act) { event.preventDefault(); act(); }
});
addEventListener("hashchange", () => { readAddress(); render(); });
addEventListener("resize", () => panes.forEach((pane) => pane.draw(true)));
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", render); // sheets, other scores
readAddress();
render();
