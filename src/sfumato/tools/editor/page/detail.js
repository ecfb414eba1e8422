// The panel of one image: its caption, written and saved.

import { act, ask, faultsOf, fileOf, store } from "./store.js";
import { plural, splitTags } from "./texts.js";

const $ = id => document.getElementById(id);
const caption = $("caption"), mirror = $("mirror"), saved = $("saved");
const COUNT_AFTER = 250; // milliseconds without typing
let current = -1, draft = null, counts = null, timer = 0, saving = null; // draft: {text, base} of the current image's file
let say = () => {};

export const currentImage = () => current;
const number = () => store.images[current].file;
const isDirty = () => draft !== null && draft.text.trim() !== fileOf(current).text;
const isConflict = () => isDirty() && draft.base !== fileOf(current).text;

export function setUp(on) {
  say = on.say;
  caption.addEventListener("input", () => {
    draft = { text: caption.value, base: draft?.base ?? fileOf(current).text };
    remember();
    showState();
    clearTimeout(timer);
    timer = setTimeout(count, COUNT_AFTER);
  });
  caption.addEventListener("blur", () => { if (document.hasFocus()) save(); });
  addEventListener("pagehide", () => save());  // the tab is closed
  $("keep-mine").addEventListener("click", () => {
    draft = { text: draft.text, base: fileOf(current).text };
    save();
  });
  $("take-theirs").addEventListener("click", () => { draft = null; remember(); show(); });
  $("own-tags").addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button) change({ action: "remove", tag: button.firstChild.textContent });
  });
  $("tag-form").addEventListener("submit", async event => {
    event.preventDefault();
    const tag = $("new-tag").value.trim();
    if (tag && (await change({ action: "add", tag }))) $("new-tag").value = "";
  });
  $("view").addEventListener("error", () => { $("view").hidden = true; $("view-fault").hidden = false; });
  store.listeners.push(files => {
    if (current < 0) return;
    if (files.has(number())) show();
    else showFaults();
    if (!counts) count();
  });
}

/** Show another image; what was written is saved first. Gives whether it is shown. */
export async function open(image) {
  if (image !== current && current >= 0 && !(await save())) return false;
  if (image !== current) {
    current = image;
    draft = recall();
    counts = null;
    const { name, version } = store.images[image];
    $("view").hidden = image in store.imageFaults;
    $("view-fault").hidden = !$("view").hidden;
    if ($("view").hidden) $("view").removeAttribute("src");
    else $("view").src = `view/${image}?v=${version}`;
    $("view").alt = name;
    show();
    count();
  }
  return true;
}

/** Save what was written; false where that was not possible. */
export async function save() {
  while (saving) await saving; // one after the other: the second would meet the first one's file
  saving = saveDraft();
  try {
    return await saving;
  } finally {
    saving = null;
  }
}

async function saveDraft() {
  if (current < 0 || !isDirty()) {
    draft = null;
    remember();
    return true;
  }
  if (isConflict()) {
    showState();
    return false;
  }
  const sent = draft, file = number();
  try {
    const outcome = await act("edit", { file, text: sent.text, base: sent.base });
    for (const failure of outcome.failures) say(failure.message, { bad: true });
    if (!outcome.changed.length) return !outcome.conflicts.length && !outcome.failures.length;
    if (draft === sent) draft = null;
    else if (draft) draft = { text: draft.text, base: sent.text.trim() }; // written on meanwhile
    remember();
    show();
    flash("Saved");
    return true;
  } catch (error) {
    say(error.message, { bad: true });
    return false;
  }
}

/** One change of tags of the current caption, saved at once. */
async function change(what) {
  if (!(await save())) return false;
  try {
    const outcome = await act("change", { files: [number()], change: what });
    for (const failure of outcome.failures) say(failure.message, { bad: true });
    if (outcome.changed.length) flash("Saved");
    return !outcome.failures.length;
  } catch (error) {
    say(error.message, { bad: true });
    return false;
  }
}

export function show() {
  const image = store.images[current], file = fileOf(current);
  const text = draft?.text ?? file.text;
  if (caption.value !== text) caption.value = text;
  $("name").textContent = image.name.split("/").at(-1);
  const folder = image.name.split("/").slice(0, -1).join("/"), users = store.users[image.file].length;
  $("facts").textContent = [
    folder, image.width ? `${image.width} × ${image.height}` : "", file.exists ? file.name : `no ${file.name} yet`,
    users > 1 ? `one file for ${users} images` : "",
  ].filter(Boolean).join(" · ");
  caption.readOnly = Boolean(file.problem) && !file.exists;
  showState();
}

function showState() {
  const file = fileOf(current), text = draft?.text ?? file.text;
  const cut = counts && counts.text === text ? counts.cut : null;
  const tail = document.createElement("mark");
  const start = cut === null ? text.length : cut + text.slice(cut).search(/\S|$/);
  tail.textContent = text.slice(start);
  mirror.replaceChildren(text.slice(0, start), tail, "\n");
  $("conflict").hidden = !isConflict();
  $("theirs").textContent = file.text || "(nothing)";
  if (isDirty()) {
    saved.textContent = isConflict() ? "Not saved" : "Not saved yet";
    saved.className = isConflict() ? "bad" : "";
  } else if (saved.textContent !== "Saved") saved.textContent = "";
  showTokens(counts && counts.text === text ? counts.tokens : draft ? null : file.tokens);
  showFaults();
  const tags = splitTags(text, store.separator);
  $("own-tags").replaceChildren(...(tags.length > 1 ? tags : []).map(tag => {
    const button = document.createElement("button"), name = document.createElement("span");
    name.textContent = tag;
    button.title = `Remove ${tag}`;
    button.append(name);
    return button;
  }));
}

function showFaults() {
  const file = fileOf(current);
  const items = faultsOf(current).map(name => store.faults[name]);
  if (file.problem) items.push(file.problem);
  $("view-fault").textContent = store.imageFaults[current] ? `The image ${store.imageFaults[current]}` : "The image cannot be shown";
  $("own-faults").replaceChildren(...items.map(text => Object.assign(document.createElement("li"), { textContent: text })));
}

function showTokens(tokens) {
  $("tokens").replaceChildren(...store.tokenizers.map(({ name, limit }, place) => {
    const span = document.createElement("span"), used = tokens?.[name];
    span.textContent = `${place ? " · " : ""}${used ?? "…"} of ${limit} tokens${store.tokenizers.length > 1 ? ` (${name})` : ""}`;
    if (used > limit) {
      span.className = "over";
      span.textContent += `, ${plural(used - limit, "is", "are")} cut`;
    }
    return span;
  }));
}

async function count() {
  const text = draft?.text ?? fileOf(current).text, image = current;
  if (!store.tokenizers.length) return;
  try {
    const answer = await ask("count", { file: number(), text });
    if (image !== current) return;
    counts = { text, ...answer };
    showState();
  } catch { /* the banner says that there is no answer */ }
}

function flash(text) {
  [saved.textContent, saved.className] = [text, "good"];
  setTimeout(() => { if (saved.textContent === text) saved.textContent = ""; }, 1600);
}

// A text that is being written survives a reload of the page.
function remember() {
  if (draft) sessionStorage.setItem("draft", JSON.stringify({ name: store.images[current].name, ...draft }));
  else sessionStorage.removeItem("draft");
}

function recall() {
  const kept = JSON.parse(sessionStorage.getItem("draft") ?? "null");
  return kept?.name === store.images[current].name ? { text: kept.text, base: kept.base } : null;
}
