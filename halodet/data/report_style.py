"""Style sheet of the dataset report: light or dark as the browser prefers, readable on a phone."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a1f26; --muted: #5b6572; --line: #dfe3e8;
  --bar: #3a74c4; --accent: #1f5fb8; --lost: #b3261e; --kept: #8a5a00; --fine: #1a7f43; --frame: #eceff2; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --ink: #e6e9ed; --muted: #9aa5b1;
  --line: #2b323b; --bar: #5b95e5; --accent: #82b1f3; --lost: #ff8a80; --kept: #f0b95a; --fine: #65cf90;
  --frame: #0b0e11; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
header, main, footer { max-width: 1160px; margin: 0 auto; padding: 0 24px; overflow-wrap: anywhere; }
header { padding-top: 32px; }
p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 4px; font-size: 20px; line-height: 1.3; }
h3 { margin: 24px 0 6px; font-size: 15px; }
h2 + .scroll { margin-top: 14px; }
section { margin-top: 48px; scroll-margin-top: 16px; }
footer { margin-top: 48px; padding-bottom: 32px; color: var(--muted); font-size: 13px; }
.kicker { color: var(--muted); font-size: 13px; }
.paths { margin-top: 6px; color: var(--muted); font-size: 13px; }
.lead, .more { color: var(--muted); }
.lead { margin-bottom: 16px; }
.remark { margin-top: 16px; padding: 10px 14px; border-left: 3px solid var(--kept); background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-top: 24px; }
.tile { padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile dt, .tile span { color: var(--muted); font-size: 13px; }
.tile b { display: block; font-size: 28px; line-height: 1.25; font-weight: 650; }
.tile.lost b { color: var(--lost); } .tile.kept b { color: var(--kept); } .tile.fine b { color: var(--fine); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 20px; font-size: 14px; }
a { color: var(--accent); text-underline-offset: 3px; }
.fine { color: var(--fine); }
.kinds { border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
.kind { display: grid; grid-template-columns: var(--digits) 1fr; gap: 14px; padding: 12px 16px; }
.kind + .kind { border-top: 1px solid var(--line); }
.count { text-align: right; font-weight: 650; }
.lost .count, .lost .action { color: var(--lost); } .kept .count, .kept .action { color: var(--kept); }
.what { font-weight: 550; } .action { font-size: 14px; }
.example { color: var(--muted); font-size: 13px; }
.notes li, .lines li { margin-top: 6px; padding-left: 14px; border-left: 2px solid var(--line); }
details { margin-top: 20px; } summary { cursor: pointer; color: var(--accent); }
.lines { font-size: 13px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 20px; }
figure { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; }
.frame { display: flex; align-items: center; justify-content: center; position: relative; aspect-ratio: 4 / 3;
  background: var(--frame); }
.frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.placeholder { padding: 24px; text-align: center; color: var(--muted); font-size: 13px; }
.placeholder b { display: block; font-size: 15px; }
figcaption { padding: 12px 14px 14px; }
.name { display: flex; gap: 8px; justify-content: space-between; align-items: baseline; font-weight: 600; }
.badge { flex: none; font-size: 13px; font-weight: 600; }
.badge.lost { color: var(--lost); } .badge.kept { color: var(--kept); }
.facts { color: var(--muted); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 6px; font-size: 13px; }
.legend span { color: var(--muted); }
figcaption .lines { margin-top: 8px; }
.chip { display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 3px;
  box-shadow: inset 0 0 0 1px rgb(0 0 0 / 30%); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); gap: 20px;
  align-items: start; }
.chart { padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.chart p { margin-top: 10px; color: var(--muted); font-size: 13px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
caption { text-align: left; }
.chart caption { margin-bottom: 6px; font-size: 15px; font-weight: 600; }
th, td { padding: 3px 0 3px 12px; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-size: 13px; vertical-align: bottom; }
.chart tr:not(.group) > th[scope=row] { width: 1%; } .chart tbody th { color: var(--muted); }
.chart td:not(.bar) { width: 1%; }
.group th, .group td { padding-top: 10px; font-weight: 600; }
.chart .group th { color: var(--ink); }
.bar i { display: block; position: relative; top: -1px; min-width: 2px; height: 12px;
  border-radius: 2px; background: var(--bar);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.scroll { overflow-x: auto; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.classes caption { margin-bottom: 8px; color: var(--muted); font-size: 13px; }
.classes tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7em; }
.classes tbody tr { border-top: 1px solid var(--line); }
.classes th, .classes td { padding-top: 5px; padding-bottom: 5px; }
.classes .bar { width: 36%; text-align: left; }
.classes .id { color: var(--muted); }
@media (max-width: 640px) {
  header, main, footer { padding: 0 16px; } header { padding-top: 20px; }
  h1 { font-size: 23px; } section { margin-top: 36px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; } .tile { padding: 10px 12px; } .tile b { font-size: 23px; }
  .kind { gap: 10px; padding: 10px 12px; }
  .gallery { grid-template-columns: 1fr; }
  .scroll { padding: 10px 12px; } .classes { font-size: 13px; } .classes thead th { font-size: 12px; }
  .classes .wide { display: none; } .classes td, .classes thead th { padding-left: 7px; }
  .classes thead th:first-child { padding-left: 0; } .classes .bar { width: auto; min-width: 36px; }
}
@media print { section { break-inside: auto; } figure, .chart { break-inside: avoid; } nav { display: none; } }
"""
