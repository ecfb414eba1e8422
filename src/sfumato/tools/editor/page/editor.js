// The page: filters, the list, keys. What is shown of one image is in detail.js, many changes at once in bulk.js.

import * as bulk from "./bulk.js";
import * as detail from "./detail.js";
import { Grid } from "./grid.js";
import { act, faultsOf, fileOf, load, store, update } from "./store.js";
import { countTags, makeTest, plural, splitTags } from "./texts.js";

const $ = id => document.getElementById(id);
const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const POLL = 2500, POLL_COUNTING = 600, MAX_TAGS = 400; // milliseconds, while tokens are counted; tags of the list
const KEYS = [
  ["j k", "next, previous image"], ["← ↑ ↓ →", "move in the grid"], ["Home End", "first, last image"],
  ["e", "edit the caption"], ["Ctrl+Enter", "save, and edit the next one"], ["Esc", "save, and leave the caption"],
  ["t", "add a tag"], ["/", "search"], ["x", "select the image"], ["a", "select all that are shown, or none"],
  ["b", "change many captions"], ["z", "undo"], ["Shift+z", "redo"], ["c", "show all images again"], ["?", "these keys"],
];
const filter = { query: "", fault: "", withTags: new Set(), withoutTags: new Set() };
const picked = new Set();
let lastPicked = -1, shown = [];

const grid = new Grid($("scroller"), $("grid"), fillCard, { open: openImage, pick });

function fillCard(card, image) {
  const { name, version } = store.images[image], file = fileOf(image), faults = faultsOf(image);
  card.className = "card" + (image === detail.currentImage() ? " current" : "") + (picked.has(image) ? " picked" : "");
  card.setAttribute("aria-selected", String(picked.has(image)));
  if (image in store.imageFaults && card.querySelector("img"))
    card.firstChild.replaceChildren(make("span", { className: "broken", textContent: store.imageFaults[image] }));
  if (!card.firstChild) {
    const box = make("div", { className: "image" }), picture = make("img", { alt: name, decoding: "async", draggable: false });
    picture.addEventListener("load", () => picture.classList.add("there"));
    picture.addEventListener("error", () => box.replaceChildren(make("span", { className: "broken", textContent: "cannot be read" })));
    if (image in store.imageFaults) box.append(make("span", { className: "broken", textContent: store.imageFaults[image] }));
    else {
      picture.src = `thumbnail/${image}?v=${version}`;
      box.append(picture);
    }
    const tick = make("button", { className: "tick", textContent: "✓", tabIndex: -1, title: "Select (x)" });
    card.append(box, make("p"), make("div", { className: "badges" }), tick);
    card.title = name;
    card.setAttribute("aria-label", name);
  }
  const [, text, badges] = card.children;
  text.textContent = file.text || (file.problem ? "unreadable caption" : file.exists ? "empty caption" : "no caption");
  text.className = file.text ? "" : "none";
  const tokens = store.tokenizers.length && file.tokens ? Math.max(...Object.values(file.tokens)) : null;
  badges.replaceChildren();
  if (faults.includes("long")) badges.append(make("span", { className: "bad", textContent: tokens, title: "tokens: over the limit" }));
  const others = faults.filter(fault => !["long", "missing", "empty"].includes(fault));
  if (others.length) badges.append(make("span", { className: "warn", textContent: "!", title: others.map(fault => store.faults[fault]).join("\n") }));
}

// ---- filters

function findMatches() {
  const test = makeTest(filter.query);
  return store.images.map((_, image) => image).filter(image => {
    const text = fileOf(image).text.toLowerCase();
    if (!test(`${text}\n${store.images[image].name.toLowerCase()}`)) return false;
    if (filter.fault && !faultsOf(image).includes(filter.fault)) return false;
    if (!filter.withTags.size && !filter.withoutTags.size) return true;
    const tags = new Set(splitTags(text, store.separator));
    return [...filter.withTags].every(tag => tags.has(tag)) && ![...filter.withoutTags].some(tag => tags.has(tag));
  });
}

/** The list stays as it is while captions change, so that the result can be seen: it is made here alone. */
function applyFilter() {
  shown = findMatches();
  for (const image of [...picked]) if (!shown.includes(image)) picked.delete(image);
  $("scroller").scrollTop = 0;
  grid.show(shown);
  $("nothing").hidden = shown.length > 0;
  if (detail.currentImage() >= 0) grid.reveal(detail.currentImage());
  showFilters();
}

function showFilters() {
  const counts = new Map();
  for (let image = 0; image < store.images.length; image++)
    for (const fault of faultsOf(image)) counts.set(fault, (counts.get(fault) ?? 0) + 1);
  $("faults").replaceChildren(...["", ...Object.keys(store.faults)].map(fault => {
    const count = fault ? counts.get(fault) ?? 0 : store.images.length;
    const button = make("button", { onclick: () => { filter.fault = filter.fault === fault ? "" : fault; applyFilter(); } });
    button.append(make("span", { textContent: fault ? store.faults[fault] : "all images" }), make("b", { textContent: count.toLocaleString("en") }));
    button.setAttribute("aria-pressed", String(filter.fault === fault));
    if (fault) button.dataset.fault = fault;
    const item = make("li", { className: fault && count ? "some" : "", hidden: Boolean(fault) && !count && filter.fault !== fault });
    item.append(button);
    return item;
  }));
  showTags();
  showShown();
}

function showTags() {
  const wanted = $("tag-search").value.trim().toLowerCase();
  const active = [...filter.withTags, ...filter.withoutTags];
  const counts = countTags(shown.map(image => fileOf(image).text), store.separator);
  const known = new Map(counts);
  $("tag-count").textContent = counts.length ? counts.length.toLocaleString("en") : "";
  const list = [...active.map(tag => [tag, known.get(tag) ?? 0]), ...counts.filter(([tag]) => tag.includes(wanted) && !active.includes(tag))];
  $("tags").replaceChildren(...list.slice(0, MAX_TAGS).map(([tag, count]) => {
    const button = make("button", { title: tag, onclick: () => turnTag(tag) });
    button.append(make("span", { textContent: tag }), make("b", { textContent: count.toLocaleString("en") }));
    button.dataset.tag = tag;
    button.setAttribute("aria-pressed", filter.withTags.has(tag) ? "true" : filter.withoutTags.has(tag) ? "mixed" : "false");
    const item = make("li");
    item.append(button);
    return item;
  }));
  $("known-tags").replaceChildren(...counts.slice(0, MAX_TAGS).map(([tag]) => make("option", { value: tag })));
}

function turnTag(tag) {
  if (filter.withTags.delete(tag)) filter.withoutTags.add(tag);
  else if (!filter.withoutTags.delete(tag)) filter.withTags.add(tag);
  applyFilter();
}

function showShown() {
  const total = store.images.length, place = shown.indexOf(detail.currentImage());
  $("shown").textContent = (shown.length === total ? plural(total, "image", "images")
    : `${shown.length.toLocaleString("en")} of ${plural(total, "image", "images")}`) + (picked.size ? `, ${picked.size.toLocaleString("en")} selected` : "");
  $("place-narrow").textContent = place < 0 ? "" : `${place + 1} of ${shown.length}`;
  const chips = [];
  const chip = (text, remove) => chips.push(make("button", { textContent: `${text} ×`, onclick: () => { remove(); applyFilter(); } }));
  if (filter.fault) chip(store.faults[filter.fault], () => (filter.fault = ""));
  for (const tag of filter.withTags) chip(tag, () => filter.withTags.delete(tag));
  for (const tag of filter.withoutTags) chip(`without ${tag}`, () => filter.withoutTags.delete(tag));
  if (picked.size) chip("selected", () => picked.clear());
  const matches = findMatches();
  if (matches.length !== shown.length || matches.some((image, i) => image !== shown[i]))
    chips.push(make("button", { id: "again", textContent: "filter again", onclick: applyFilter }));
  $("chips").replaceChildren(...chips.map(button => { const item = make("li"); item.append(button); return item; }));
  [$("undo").disabled, $("redo").disabled] = [!store.done.length, !store.undone.length];
  $("undo").title = `Undo${store.done.length ? `: ${store.done.at(-1).label}` : ""} (z)`;
  $("progress").textContent = store.tokenFault ? `No tokens are counted: ${store.tokenFault}`
    : store.counting < 0 ? "The tokenizer is being loaded" : store.counting ? `Counting tokens: ${plural(store.counting, "caption", "captions")} left` : "";
}

function clearFilter() {
  Object.assign(filter, { query: "", fault: "", withTags: new Set(), withoutTags: new Set() });
  $("search").value = $("tag-search").value = "";
  applyFilter();
}

// ---- images

async function openImage(image, { quietly = false } = {}) {
  const before = detail.currentImage();
  if (!(await detail.open(image))) return false;
  if (!quietly) document.body.classList.add("detail");
  sessionStorage.setItem("current", store.images[image].name);
  grid.refresh(item => item === before || item === image);
  grid.reveal(image);
  showShown();
  return true;
}

async function move(steps) {
  if (!shown.length) return false;
  const place = shown.indexOf(detail.currentImage());
  const next = place < 0 ? 0 : Math.min(Math.max(place + steps, 0), shown.length - 1);
  return openImage(shown[next], { quietly: !document.body.classList.contains("detail") });
}

function pick(image, event) {
  if (event?.shiftKey && lastPicked >= 0) {
    const [from, to] = [shown.indexOf(lastPicked), shown.indexOf(image)].sort((a, b) => a - b);
    if (from >= 0) for (const each of shown.slice(from, to + 1)) picked.add(each);
  } else if (!picked.delete(image)) picked.add(image);
  lastPicked = image;
  grid.refresh();
  showShown();
}

function pickAll() {
  if (picked.size) picked.clear();
  else for (const image of shown) picked.add(image);
  grid.refresh();
  showShown();
}

// ---- changes

function getTargets() {
  if (picked.size) return { images: [...picked], label: picked.size === 1 ? "the selected image" : `the ${picked.size.toLocaleString("en")} selected images` };
  const all = shown.length === store.images.length;
  return { images: shown, label: `${all ? "all" : "the"} ${plural(shown.length, "image", "images")}${all ? "" : " shown"}` };
}

function report(outcome, ending, toast = {}) {
  const count = outcome.changed.length;
  if (count) say(`Changed ${plural(count, "caption", "captions")}${ending}`, toast);
  if (outcome.conflicts.length)
    say(`${plural(outcome.conflicts.length, "file was", "files were")} changed on disk meanwhile and left alone`, { bad: true });
  if (outcome.failures.length)
    say(`${outcome.failures[0].message}${outcome.failures.length > 1 ? `, and ${outcome.failures.length - 1} more` : ""}`, { bad: true });
}

async function travel(direction, steps = 1) {
  if (!(await detail.save())) return;
  try {
    const outcome = await act("move", { direction, steps });
    if (outcome.changed.length + outcome.conflicts.length + outcome.failures.length)
      report(outcome, direction === "undo" ? " back" : " again");
  } catch (error) {
    say(error.message, { bad: true });
  }
}

function toggleHistory(open = $("history").hidden) {
  const box = $("history"), place = $("history-open").getBoundingClientRect();
  box.hidden = !open;
  $("history-open").setAttribute("aria-expanded", String(open));
  if (!open) return;
  box.style.top = `${place.bottom + 6}px`;
  box.style.left = `${Math.max(8, place.right - 320)}px`;
  const entry = (step, className, onclick) => {
    const button = make("button", { className, onclick: () => { toggleHistory(false); onclick(); } });
    button.append(make("span", { textContent: step.label }), make("b", { textContent: step.count.toLocaleString("en") }));
    return button;
  };
  const undone = store.undone.map((step, i) => entry(step, "undone", () => travel("redo", i + 1))).reverse();
  const done = store.done.map((step, i) => entry(step, "", () => travel("undo", store.done.length - i))).reverse();
  const now = make("p", { className: "now", textContent: done.length || undone.length ? "now · a click undoes down to a line" : "Nothing has been changed yet." });
  box.replaceChildren(...undone, now, ...done);
}

export function say(text, { bad = false, action = null } = {}) {
  const toast = make("div", { className: bad ? "toast bad" : "toast" });
  toast.append(make("span", { textContent: text }));
  if (action) toast.append(make("button", { textContent: action[0], onclick: () => { toast.remove(); action[1](); } }));
  $("toasts").append(toast);
  setTimeout(() => toast.remove(), bad ? 9000 : 5000);
}

// ---- keys

async function saveAndGoOn() {
  const before = detail.currentImage();
  if (await move(1)) {
    if (detail.currentImage() === before) await detail.save();
    $("caption").focus();
  }
}

const COMMANDS = {
  j: () => move(1), k: () => move(-1), ArrowRight: () => move(1), ArrowLeft: () => move(-1),
  ArrowDown: () => move(grid.columns), ArrowUp: () => move(-grid.columns), Home: () => move(-Infinity), End: () => move(Infinity),
  "/": () => $("search").select(), e: editCaption, Enter: editCaption,
  t: async () => { if (await ensureCurrent()) $("new-tag").focus(); },
  x: () => { if (detail.currentImage() >= 0) pick(detail.currentImage()); },
  a: pickAll, b: () => bulk.openDialog(getTargets()), z: () => travel("undo"), Z: () => travel("redo"), c: clearFilter,
  "?": () => $("help").showModal(),
  Escape: () => { document.body.classList.remove("detail", "side"); toggleHistory(false); },
};

const ensureCurrent = () => (detail.currentImage() >= 0 ? true : move(0));

async function editCaption() {
  if (!(await ensureCurrent())) return;
  document.body.classList.add("detail");
  $("caption").focus();
  $("caption").setSelectionRange($("caption").value.length, $("caption").value.length);
}

document.addEventListener("keydown", event => {
  const { target, key } = event;
  if (document.querySelector("dialog[open]")) return;
  if (target.matches("input, textarea")) {
    if (target.id === "caption" && key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      saveAndGoOn();
    } else if (target.id === "caption" && key === "s" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      detail.save();
    } else if (key === "Escape" || (key === "Enter" && target.id === "search")) {
      event.preventDefault();
      target.blur();
    }
    return;
  }
  if (event.ctrlKey && key === "z") return void (event.preventDefault(), travel(event.shiftKey ? "redo" : "undo"));
  if (event.ctrlKey || event.metaKey || event.altKey || !(key in COMMANDS)) return;
  if (key === "Enter" && target.matches("button")) return;
  event.preventDefault();
  COMMANDS[key]();
});

let searchTimer = 0;
function search() {
  clearTimeout(searchTimer);
  if (filter.query === $("search").value) return;
  filter.query = $("search").value;
  applyFilter();
}
$("search").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 120);
});
$("search").addEventListener("blur", search); // whatever comes next is for what was searched
$("tag-search").addEventListener("input", showTags);
for (const [id, run] of Object.entries({
  undo: () => travel("undo"), redo: () => travel("redo"), "history-open": () => toggleHistory(), clear: clearFilter,
  "change-open": () => bulk.openDialog(getTargets()), "help-open": () => $("help").showModal(),
  "side-open": () => document.body.classList.add("side"), "side-close": () => document.body.classList.remove("side"),
  "detail-close": async () => { if (await detail.save()) document.body.classList.remove("detail"); },
})) $(id).addEventListener("click", run);
document.querySelector(".step-back").addEventListener("click", () => move(-1));
document.querySelector(".step-on").addEventListener("click", () => move(1));
for (const button of document.querySelectorAll("dialog .close"))
  button.addEventListener("click", () => button.closest("dialog").close());
for (const dialog of document.querySelectorAll("dialog"))
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
document.addEventListener("pointerdown", event => {
  if (!event.target.closest("#history, #history-open")) toggleHistory(false);
});
for (const [keys, text] of KEYS) {
  const term = make("dt");
  keys.split(" ").forEach(key => term.append(make("kbd", { textContent: key }), " "));
  $("keys").append(term, make("dd", { textContent: text }));
}

store.listeners.push(files => {
  grid.refresh(image => files.has(store.images[image].file) || image in store.imageFaults);
  showFilters();
});
bulk.setUp({ finish: outcome => report(outcome, "", { action: ["Undo", () => travel("undo")] }) });
detail.setUp({ say });
await load();
$("title").textContent = store.title.split(/[\\/]/).filter(Boolean).at(-1) ?? store.title;
$("title").title = [store.title, ...store.notes].join("\n");
document.title = `${$("title").textContent} – captions`;
applyFilter();
const last = store.images.findIndex(image => image.name === sessionStorage.getItem("current"));
await openImage(Math.max(last, 0), { quietly: true });
document.body.dataset.ready = "";
const poll = () => update().catch(() => {});
(function pollAgain() {
  setTimeout(async () => { if (!document.hidden) await poll(); pollAgain(); }, store.counting ? POLL_COUNTING : POLL);
})();
window.addEventListener("focus", poll);
