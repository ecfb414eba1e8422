"""How the page of a comparison looks, beyond what it shares with a run's report."""

COMPARE_CSS = """
dl.spaced { margin-top: 18px; }
.verdict { border-color: var(--good); border-width: 2px; }
.verdict.none { border-color: var(--line); }
.verdict h2 { font-size: 20px; margin-bottom: 6px; }
.verdict code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--good); }
.verdict p + p { margin-top: 4px; }
.scores tr > th:first-child { text-align: left; }
.scores .taken > * { font-weight: 620; color: var(--good); }
.meanings { padding-left: 18px; margin: 8px 0 0; }
.strip { overflow-x: auto; max-width: 100%; scroll-behavior: auto; }
.compared th.taken { color: var(--good); font-weight: 620; }
.compared td { padding-bottom: 8px; }
.compared td.taken img { outline: 3px solid var(--good); outline-offset: -3px; }
.compared img { width: clamp(96px, calc((min(100vw, 1160px) - 84px) / var(--columns) - 8px), 148px); }
.pairs { list-style: none; margin: 12px 0 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(216px, 1fr)); }
.pairs div { display: flex; gap: 6px; margin: 4px 0; }
.pairs img { width: 100px; height: auto; border-radius: 6px; background: var(--hair); }
.pairs b { font-size: 13px; font-weight: 600; } .pairs .taken b { color: var(--good); }
.pairs small { color: var(--soft); }
@media (max-width: 760px) {
  .compared img { width: 104px; }
  .compared td:first-child, .compared thead th:first-child { position: sticky; left: 0; background: var(--card); }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
  .pairs img { width: 72px; }
  .verdict h2 { font-size: 17px; }
}
"""

COMPARE_SCRIPT = """
for (const strip of document.querySelectorAll(".strip")) {
  const taken = strip.querySelector("th.taken");
  if (taken) strip.scrollLeft = taken.offsetLeft - (strip.clientWidth - taken.offsetWidth) / 2;
}
"""
