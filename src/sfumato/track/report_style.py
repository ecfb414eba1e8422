"""How the report's page looks, and the little script that reads values off its curves."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f7f4ee; --card: #fffdf9; --ink: #2a2622; --soft: #6d655c; --line: #e4ddd1; --hair: #eee8dd;
  --good: #4d7344; --warn: #9a5b13; --warnback: #fbf1de; --bad: #b3372b;
  --c0: #a8492a; --c1: #4b748f; --c2: #a67c1f; --c3: #5f7d4f; --c4: #84567c; --c5: #3d8a83;
  --c6: #c0714f; --c7: #7a746b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171513; --card: #1f1c19; --ink: #ece5da; --soft: #a69c8f; --line: #37322c; --hair: #2a2622;
    --good: #8fbb80; --warn: #e0b060; --warnback: #2c2415; --bad: #ef7d6c;
    --c0: #e5896a; --c1: #82b1cf; --c2: #d9b25c; --c3: #9dc088; --c4: #c595bc; --c5: #72c2b9;
    --c6: #eeb197; --c7: #b3aa9d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 56px; display: grid; gap: 20px; }
main > *, .pair > * { min-width: 0; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.015em; font-weight: 650; }
h2 { font-size: 16px; margin: 0; font-weight: 620; }
h3 { font-size: 13px; margin: 18px 0 6px; font-weight: 600; color: var(--soft); }
p { margin: 0; }
a { color: inherit; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
header .over { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
header .subtitle { color: var(--soft); margin-top: 4px; }
.state {
  font-size: 13px; font-weight: 600; padding: 2px 11px; border-radius: 99px; border: 1px solid currentColor;
  color: var(--soft);
}
.state.finished { color: var(--good); } .state.running { color: var(--c1); }
.state.stopped, .state.silent { color: var(--warn); } .state.failed { color: var(--bad); }
.progress { height: 6px; background: var(--line); border-radius: 99px; overflow: hidden; margin: 18px 0 16px; }
.progress i { display: block; height: 100%; background: var(--c0); border-radius: 99px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 14px 20px; margin: 0; }
dl.facts dt { font-size: 12.5px; color: var(--soft); }
dl.facts dd { margin: 0; font-size: 18px; font-weight: 560; font-variant-numeric: tabular-nums; line-height: 1.35; }
dl.facts dd small { font-size: 13px; font-weight: 400; color: var(--soft); }
.failure { color: var(--bad); margin-top: 14px; }
section, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; margin: 0;
}
.pair { display: grid; gap: 20px; grid-template-columns: repeat(2, 1fr); }
.pair > :last-child:nth-child(odd) { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline; margin-bottom: 22px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.legend i { display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--color); }
.legend i.limit { height: 0; border-top: 2px dashed var(--soft); }
.legend i.bad { width: 3px; height: 10px; background: var(--bad); }
.legend i.faint { opacity: .4; }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); } .c3 { --color: var(--c3); }
.c4 { --color: var(--c4); } .c5 { --color: var(--c5); } .c6 { --color: var(--c6); } .c7 { --color: var(--c7); }
.plot { position: relative; height: 210px; margin: 0 10px 30px 50px; touch-action: pan-y; }
.wide .plot { height: 290px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; pointer-events: none; }
.plot svg * { vector-effect: non-scaling-stroke; fill: none; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .line { stroke: var(--color); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.plot .faint { stroke-width: 1; opacity: .38; }
.plot .limit { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot .bad { stroke: var(--bad); stroke-width: 2; }
.plot .bar { fill: var(--color); }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; pointer-events: none; }
.plot span.y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.plot span.x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.plot .hair { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.plot .tip { position: absolute; top: 6px; padding: 6px 10px; border-radius: 8px; font-size: 12.5px; line-height: 1.5;
  background: var(--ink); color: var(--paper); pointer-events: none; white-space: nowrap; z-index: 2; }
.note { font-size: 13px; color: var(--soft); }
details { margin-top: 8px; font-size: 13.5px; }
summary { cursor: pointer; color: var(--soft); width: fit-content; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; color: var(--soft); font-size: 13px; padding: 8px 0 4px; }
.numbers th, .numbers td { text-align: right; padding: 3px 22px 3px 0; border-bottom: 1px solid var(--hair);
  font-weight: 400; white-space: nowrap; }
.numbers thead th { color: var(--soft); font-size: 12.5px; }
.words { width: 100%; font-size: 14px; }
.words th, .words td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--hair);
  font-weight: 400; vertical-align: top; }
.words thead th { color: var(--soft); font-size: 12.5px; }
.words tbody th { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px; }
.words td:last-child { color: var(--soft); white-space: nowrap; }
.words.plain tbody th { font: inherit; } .words.plain td { white-space: nowrap; color: inherit; }
.words.plain thead th { white-space: nowrap; }
tr:last-child > * { border-bottom: 0 !important; }
.warnings { background: var(--warnback); }
.warnings ul { margin: 8px 0 0; padding-left: 20px; } .warnings li { padding: 2px 0; }
.warnings li small { color: var(--soft); }
.samples table { margin-top: 6px; }
.samples thead th { font-size: 12.5px; font-weight: 400; color: var(--soft); text-align: left; padding: 0 8px 2px 0; }
.samples td { padding: 0 8px 0 0; vertical-align: top; }
.samples .prompt th { font-weight: 400; text-align: left; padding: 12px 0 6px; }
.samples .prompt p { position: sticky; left: 0; width: fit-content; max-width: min(1050px, calc(100vw - 86px)); }
.samples .prompt small { color: var(--soft); display: block; }
.samples img { display: block; border-radius: 6px; width: 132px; height: auto; background: var(--hair); }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); gap: 16px 14px;
  margin: 12px 0 0; padding: 0; list-style: none; }
.images + .images { border-top: 1px solid var(--line); padding-top: 14px; margin-top: 14px; }
.images li { min-width: 0; font-size: 13px; line-height: 1.4; }
.images img { display: block; width: 100%; height: auto; max-height: 170px; object-fit: contain; object-position: left;
  margin-bottom: 4px; }
.images b { font-variant-numeric: tabular-nums; font-size: 15px; font-weight: 600; }
.images :is(small, span, em) { color: var(--soft); } .images :is(span, em) { display: block; }
.images p { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.tiles { margin-top: 16px !important; }
footer { color: var(--soft); font-size: 13px; }
@media (max-width: 760px) {
  body { font-size: 14.5px; }
  main { padding: 22px 12px 40px; gap: 14px; }
  h1 { font-size: 25px; }
  .pair { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  section, figure { padding: 14px; }
  .wide .plot, .plot { height: 200px; }
  .plot { margin-left: 44px; margin-right: 6px; }
  dl.facts { grid-template-columns: repeat(2, 1fr); }
  .words:not(.plain) :is(tbody, tr, th), .words:not(.plain) caption { display: block; }
  .words:not(.plain) thead { display: none; }
  .words:not(.plain) tr { padding: 6px 0; border-bottom: 1px solid var(--hair); }
  .words:not(.plain) :is(th, td) { padding: 0 12px 0 0; border: 0; }
  .words:not(.plain) td { display: inline; }
  .samples .prompt p { max-width: calc(100vw - 54px); }
  .samples img { width: 116px; }
}
@media print { .scroll { overflow: visible; } section, figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot[data-x]")) {
  const numbers = text => text.trim().split(/[ ,]+/).map(Number);
  const [left, right] = numbers(plot.dataset.x), [low, high] = numbers(plot.dataset.y);
  const lines = [...plot.querySelectorAll("polyline")].map(line => {
    const flat = numbers(line.getAttribute("points")), points = [];
    for (let i = 0; i < flat.length; i += 2) points.push([flat[i], flat[i + 1]]);
    return {name: line.dataset.name, points};
  }).filter(line => line.points.length);
  const hair = document.createElement("i"), tip = document.createElement("div");
  hair.className = "hair"; tip.className = "tip";
  const hide = () => { hair.remove(); tip.remove(); };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 1000;
    if (x < 0 || x > 1000 || !lines.length) return hide();
    const nearest = points => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const points = lines.map(line => [line.name, nearest(line.points)]);
    const place = points[0][1][0] / 1000;
    tip.replaceChildren(...[plot.dataset.word + " " + Math.round(left + place * (right - left)).toLocaleString("en"),
      ...points.map(([name, point]) => name + "  " + Number((high - point[1] / 1000 * (high - low)).toPrecision(3)))]
      .map(text => Object.assign(document.createElement("div"), {textContent: text})));
    hair.style.left = place * 100 + "%";
    tip.style.left = place < .5 ? "calc(" + place * 100 + "% + 10px)" : "auto";
    tip.style.right = place < .5 ? "auto" : "calc(" + (1 - place) * 100 + "% + 10px)";
    plot.append(hair, tip);
  });
  plot.addEventListener("pointerleave", hide);
}
for (const strip of document.querySelectorAll(".samples .scroll")) strip.scrollLeft = strip.scrollWidth;
const {state, until, silent} = document.body.dataset, pill = document.querySelector(".state");
if (state === "running")
  if (Date.now() / 1000 > Number(until)) {
    pill.className = "state silent";
    pill.textContent = silent;
  } else setInterval(() => {
    if (!document.hidden && !document.querySelector("details[open], .tip")) location.reload();
  }, 30000);
"""
