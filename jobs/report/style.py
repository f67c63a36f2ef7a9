"""The style sheet of the report: light, readable without color, and for printing too."""

STYLE = """
:root { color-scheme: light; --ink: #1b2430; --soft: #566273; --line: #dde3ea; --back: #f5f7f9; --blue: #1d5fbf;
  --orange: #b45309; --teal: #0f766e; --purple: #7c3aed; --red: #b91c1c; --green: #15803d; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main, header.top { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 0 0 12px; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 24px 0 8px; }
p { margin: 6px 0; max-width: 90ch; }
.soft { color: var(--soft); }
section, .missing { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 20px 22px;
  margin: 18px 0; }
.missing { border-left: 5px solid var(--orange); }
.missing ul { margin: 6px 0; padding-left: 20px; overflow-wrap: anywhere; }
nav { margin: 12px 0 0; display: flex; flex-wrap: wrap; gap: 6px 16px; }
a { color: var(--blue); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, .share-cell { white-space: nowrap; }
td.name { min-width: 9em; }
th, td { padding: 5px 12px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; min-width: 3em; }
th.number, td.number { text-align: right; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.scrolls { overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 10px 24px; margin: 0; }
dl > div { min-width: 0; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
.state { display: inline-block; padding: 0 9px; border-radius: 10px; color: #fff; background: var(--soft);
  font-size: 13px; font-weight: 600; white-space: nowrap; }
.state.done { background: var(--green); } .state.running { background: var(--blue); }
.state.failed { background: var(--red); }
.state.stopped, .state.cancelled { background: var(--purple); }
.state.waiting, .state.unknown { background: var(--orange); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 18px 26px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 18px; font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); }
.marks { margin-top: 10px; }
.swatch { display: inline-block; width: 18px; height: 0; border-top: 3px solid; vertical-align: middle;
  margin-right: 6px; }
.swatch.mark { border-top-style: dashed; border-top-width: 2px; }
.swatch.triangle { width: 0; border: 5px solid transparent; border-top-width: 0; border-bottom: 8px solid var(--soft); }
svg { display: block; width: 100%; height: auto; background: #fff; }
svg text { font-size: 12.5px; fill: var(--soft); font-family: inherit; }
.grid { stroke: #e8ecf1; } .axis { stroke: #8b97a7; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.c0 { color: var(--blue); stroke: var(--blue); } .c1 { color: var(--orange); stroke: var(--orange); }
.c2 { color: var(--teal); stroke: var(--teal); }
.dot.c0 { fill: var(--blue); } .dot.c1 { fill: var(--orange); } .dot.c2 { fill: var(--teal); }
.share { fill: #8fb1df; } .diagonal { stroke: var(--orange); stroke-width: 1.6; stroke-dasharray: 5 4; }
.mark { stroke-width: 1.4; stroke-dasharray: 5 4; }
.settings-changed { stroke: var(--teal); color: var(--teal); stroke-dashoffset: 5; }
.resume { stroke: var(--purple); color: var(--purple); } .roll-back { stroke: var(--red); color: var(--red); }
.not-applied { stroke: #d97706; color: #d97706; } .save { fill: var(--soft); }
.bar { display: inline-block; width: 110px; height: 9px; background: #e8ecf1; border-radius: 3px;
  vertical-align: middle; margin-right: 8px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--blue); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px 36px;
  margin-top: 16px; align-items: start; }
.columns h3:first-child { margin-top: 0; }
.narrow { max-width: 720px; }
.reasons { margin-top: 10px; overflow-wrap: anywhere; }
.picture img { max-width: 100%; height: auto; border: 1px solid var(--line); }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--blue); font-weight: 600; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: 12px; font: 12.5px/1.45
  ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { max-width: 1240px; margin: 0 auto; padding: 6px 24px 36px; color: var(--soft); font-size: 13px; }
@media print {
  body { background: #fff; font-size: 11pt; } section, .missing { border: 0; padding: 0; margin: 14pt 0; }
  section[id]:not(#stage-0) { break-before: page; } nav { display: none; } a { color: inherit; text-decoration: none; }
  figure, tr, dl > div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; } .scrolls { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
