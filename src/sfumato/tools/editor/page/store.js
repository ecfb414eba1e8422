// What the page knows: images, captions, history. It talks to the server, and tells listeners what changed.

export const store = {
  images: [], // {name, width, height, version, file}
  files: [], // by number: {text, exists, faults, tokens, name, problem}
  imageFaults: {}, faults: {}, tokenizers: [], done: [], undone: [], notes: [],
  separator: ",", revision: 0, counting: -1, tokenFault: "", title: "",
  listeners: [],
  users: [], // file -> its images
};

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), keepalive: true,
  };
  if (options.body?.length > 60000) delete options.keepalive; // more is not allowed with it
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    announceLoss(true);
    throw new Error("sfumato does not answer");
  }
  announceLoss(false);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

function announceLoss(isLost) {
  const banner = document.getElementById("lost");
  banner.hidden = !isLost;
  banner.textContent = "sfumato has ended: nothing can be saved. Start it again, and open the address that it prints.";
}

export async function load() {
  const content = await request("state");
  for (const name of ["images", "faults", "separator", "title", "notes"]) store[name] = content[name];
  store.images.forEach((image, number) => (store.users[image.file] ??= []).push(number));
  merge(content);
}

function merge(content) {
  const before = [store.done.length, store.undone.length, store.counting].join();
  for (const file of content.files) store.files[file.id] = file;
  if (content.image_faults) store.imageFaults = content.image_faults;
  store.revision = content.revision;
  store.tokenizers = content.tokenizers;
  [store.done, store.undone] = [content.done, content.undone];
  [store.counting, store.tokenFault] = [content.counting, content.token_fault];
  const files = new Set(content.files.map(file => file.id));
  if (files.size || content.image_faults || before !== [store.done.length, store.undone.length, store.counting].join())
    for (const listener of store.listeners) listener(files);
}

let updating = Promise.resolve();

/** Fetch what is new; one after the other, so that an older answer never follows a newer one. */
export function update() {
  updating = updating.catch(() => {}).then(async () => merge(await request(`changes?since=${store.revision}`)));
  return updating;
}

/** Send an action, then fetch what it changed. */
export async function act(name, body) {
  const outcome = await request(name, body);
  await update();
  return outcome;
}

export const ask = request;
export const fileOf = image => store.files[store.images[image].file];
export const faultsOf = image => (image in store.imageFaults ? [...fileOf(image).faults, "damaged"] : fileOf(image).faults);
