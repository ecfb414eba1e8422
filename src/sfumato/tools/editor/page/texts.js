// Pure functions on captions: tags, searching, and what differs between two texts.

export const splitTags = (text, separator) =>
  text.split("\n").flatMap(line => line.split(separator)).map(tag => tag.trim()).filter(Boolean);

/** Words that must all occur, -words that must not, "phrases" -> a test of a text in small letters. */
export function makeTest(query) {
  const terms = [...query.toLowerCase().matchAll(/(-?)(?:"([^"]*)"?|(\S+))/g)]
    .map(match => ({ excluded: match[1] === "-", text: match[2] ?? match[3] }))
    .filter(term => term.text);
  return text => terms.every(term => text.includes(term.text) !== term.excluded);
}

/** Counts of tags, the most frequent first: [name as it is written first, count]. */
export function countTags(texts, separator) {
  const counts = new Map();
  for (const text of texts)
    for (const tag of new Set(splitTags(text.toLowerCase(), separator))) counts.set(tag, (counts.get(tag) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}

const MAX_WORDS = 400; // of a text whose differences are found word by word

/** Pieces [kind, text] with kind "same", "del" or "ins": the longest common sequence of words. */
export function diffWords(before, after) {
  const a = before.match(/\w+|\s+|[^\w\s]/gu) ?? [], b = after.match(/\w+|\s+|[^\w\s]/gu) ?? [];
  if (a.length > MAX_WORDS || b.length > MAX_WORDS) return [["del", before], ["ins", after]];
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const pieces = [];
  const add = (kind, text) => {
    if (pieces.length && pieces.at(-1)[0] === kind) pieces.at(-1)[1] += text;
    else pieces.push([kind, text]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length)
    if (i < a.length && j < b.length && a[i] === b[j]) add("same", a[i++]), j++;
    else if (i < a.length && (j === b.length || lengths[i + 1][j] >= lengths[i][j + 1])) add("del", a[i++]);
    else add("ins", b[j++]);
  return pieces;
}

export const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
