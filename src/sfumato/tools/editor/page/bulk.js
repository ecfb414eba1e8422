// The dialog that changes many captions at once: what, for which, and how they will look.

import { act, ask, store } from "./store.js";
import { diffWords, plural } from "./texts.js";

const $ = id => document.getElementById(id);
const dialog = $("change"), form = $("change-form");
let targets = { images: [], label: "" }, finish = () => {}, latest = 0, timer = 0;

export function setUp(on) {
  finish = on.finish;
  form.addEventListener("input", () => { showFields(); forgetPreview(); timer = setTimeout(preview, 120); });
  form.addEventListener("submit", event => { event.preventDefault(); apply(); });
}

/** chosen: the images to change, as long as the dialog is open, and what they are called. */
export function openDialog(chosen) {
  targets = chosen;
  $("samples").replaceChildren();
  dialog.showModal();
  showFields();
  [...form.querySelectorAll("#fields input")].find(field => field.offsetParent)?.focus();
  preview();
}

const kind = () => form.elements.kind.value;
const numbers = () => [...new Set(targets.images.map(image => store.images[image].file))];

function showFields() {
  for (const field of form.querySelectorAll("[data-kinds]"))
    field.hidden = !field.dataset.kinds.split(" ").includes(kind());
}

/** What the fields say; null as long as something is missing. */
function readChange() {
  const { find, replacement, tag, name, match_case, whole_words, at_start } = form.elements;
  const filled = text => Boolean(text.trim());
  switch (kind()) {
    case "replace": return find.value ? { action: "replace", find: find.value, replacement: replacement.value,
      match_case: match_case.checked, whole_words: whole_words.checked } : null;
    case "add": return filled(tag.value) ? { action: "add", tag: tag.value, at_start: at_start.checked } : null;
    case "remove": return filled(tag.value) ? { action: "remove", tag: tag.value } : null;
    case "rename": return filled(tag.value) && filled(name.value) ? { action: "rename", tag: tag.value, name: name.value } : null;
    default: return { action: "tidy" };
  }
}

/** What was shown is of other fields, and so is an answer that is still to come: nothing can be applied before the next. */
function forgetPreview() {
  latest++;
  clearTimeout(timer);
  $("apply").disabled = true;
  $("apply").textContent = "Change";
}

async function preview() {
  forgetPreview();
  const request = latest, change = readChange(), { label } = targets, files = numbers();
  if (!change) {
    $("scope").textContent = `Applies to ${label}.`;
    $("samples").replaceChildren();
    return;
  }
  try {
    const answer = await ask("change", { files, change, preview: true });
    if (request !== latest) return;
    $("scope").textContent = answer.count
      ? `Changes ${plural(answer.count, "caption", "captions")} of ${label}:` : `Changes none of ${label}.`;
    $("samples").replaceChildren(...answer.samples.map(makeSample));
    if (answer.count > answer.samples.length) {
      const more = Object.assign(document.createElement("li"), { textContent: `and ${answer.count - answer.samples.length} more` });
      $("samples").append(more);
    }
    $("apply").disabled = !answer.count;
    $("apply").textContent = answer.count ? `Change ${plural(answer.count, "caption", "captions")}` : "Change";
  } catch (error) {
    $("scope").textContent = error.message;
  }
}

function makeSample({ file, before, after }) {
  const item = document.createElement("li"), name = document.createElement("small");
  name.textContent = store.images[store.users[file][0]].name;
  item.append(name, ...diffWords(before, after).map(([kind, text]) =>
    kind === "same" ? text : Object.assign(document.createElement(kind), { textContent: text })));
  return item;
}

async function apply() {
  const change = readChange();
  if (!change || $("apply").disabled) return;
  forgetPreview();
  $("apply").textContent = "Changing…";
  try {
    const outcome = await act("change", { files: numbers(), change });
    dialog.close();
    finish(outcome);
  } catch (error) {
    $("scope").textContent = error.message;
    $("apply").textContent = "Try again";
    $("apply").disabled = false;
  }
}
