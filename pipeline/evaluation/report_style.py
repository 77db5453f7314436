"""The report's style sheet: one column, quiet colours, light and dark, a phone's width up."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --ink: #1c1e22; --soft: #5d6169; --line: #e5e2db;
  --accent: #3552c8; --right: #1b7a58; --wrong: #b93a1f; --wrong-tint: #fbe9e4;
  --pretrained: #8a6414; --untrained: #7b4fa6; --pixels: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131519; --card: #1b1e24; --ink: #e9e7e2; --soft: #a3a8b1; --line: #30343c;
    --accent: #93a9ff; --right: #5fcba2; --wrong: #ff8f73; --wrong-tint: #3a211b;
    --pretrained: #e0b45c; --untrained: #c6a3ec; --pixels: #a9afba;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .4rem 0 1rem; max-width: 68ch; }
a { color: var(--accent); }
.lead { font-size: clamp(1.3rem, 3.6vw, 1.85rem); line-height: 1.32; font-weight: 500;
  max-width: 34em; letter-spacing: -.01em; margin: 0 0 1.6rem; text-wrap: pretty; }
.lead strong { color: var(--accent); font-weight: 650; white-space: nowrap; }
.note, figcaption, .small { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem;
  margin: 0; padding: 0; list-style: none; }
.card, .tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.1rem; }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 620;
  font-variant-numeric: tabular-nums; }
.tiles .small { display: block; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: .9rem; margin: 1rem 0; }
figure { margin: 0; }
figure h3 { margin: 0 0 .4rem; font-size: .95rem; }
.scroll { overflow-x: auto; margin: 1rem 0; background: var(--card);
  border: 1px solid var(--line);
  border-radius: 12px; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: separate; border-spacing: 0;
  width: 100%; font-variant-numeric: tabular-nums;
  font-size: .95rem; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding: .8rem 1rem .3rem; }
th, td { text-align: left; padding: .5rem 1rem; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; font-size: .85rem; color: var(--soft); font-weight: 600;
  white-space: nowrap; }
tbody th { font-weight: 600; width: 1%; padding-right: 2rem; white-space: nowrap;
  position: sticky; left: 0;
  background: var(--card); }
caption span { position: sticky; left: 1rem; display: inline-block;
  max-width: calc(100vw - 4.5rem); }
td.number, th.number { text-align: right; white-space: nowrap; }
td .small { white-space: nowrap; display: block; }
.bar { position: relative; display: block; height: .5rem; border-radius: 4px;
  background: var(--line);
  min-width: 90px; margin-top: .5rem; overflow: hidden; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .6rem 0 0; padding: 0;
  list-style: none;
  font-size: .9rem; color: var(--soft); }
.key li { display: flex; gap: .5rem; align-items: baseline; }
.key svg { flex: none; width: 14px; height: 14px; position: relative; top: 2px; }
.hash { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace;
  overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); padding: .2rem 0; }
footer { margin-top: 3.5rem; color: var(--soft); font-size: .9rem;
  border-top: 1px solid var(--line);
  padding-top: 1rem; }

.compare { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1rem 1.6rem;
  align-items: center; }
.compare .key { flex-direction: column; gap: .5rem; margin: 0; }
svg.chart { display: block; width: 100%; height: auto; font-size: 11px; }
svg text { fill: var(--soft); }
svg .x-tick, svg .axis-label { text-anchor: middle; }
svg .y-tick, svg .row-label { text-anchor: end; }
svg .row-label { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg .dot { fill: var(--accent); }
svg .bubble { fill: var(--accent); fill-opacity: .75; stroke: var(--card); }
svg .gap { stroke: var(--soft); }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .chance { stroke: var(--soft); stroke-width: 2; stroke-dasharray: 2 2; }
svg .mark { stroke: var(--card); stroke-width: 1.2; }
svg .whisker { stroke-width: 2; }
.model { fill: var(--accent); } .model .whisker { stroke: var(--accent); }
.pretrained { fill: var(--pretrained); } .pretrained .whisker { stroke: var(--pretrained); }
.untrained { fill: var(--untrained); } .untrained .whisker { stroke: var(--untrained); }
.pixels { fill: var(--pixels); } .pixels .whisker { stroke: var(--pixels); }

img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  background: #888; border-radius: 4px; }
.pixelated img { image-rendering: pixelated; }
.episode { margin: 1rem 0; }
.class { display: grid; grid-template-columns: 218px 1fr; gap: .5rem 1.3rem;
  padding: .75rem 0 .6rem;
  border-top: 1px solid var(--line); }
.learned { display: flex; gap: .7rem; align-items: flex-start; }
.learned .shots { flex: 0 0 auto; max-width: 96px; }
.name { font-size: .8rem; line-height: 1.35; color: var(--soft); overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
.name b { color: var(--ink); font-size: .95rem; }
.shots { display: flex; flex-wrap: wrap; gap: 4px; }
.shots img { width: 46px; border: 1px solid var(--line); }
.queries { display: flex; flex-wrap: wrap; gap: 7px 5px; margin: 0; padding: 0; list-style: none;
  align-content: flex-start; }
.queries li { width: 44px; font-size: .68rem; white-space: nowrap; line-height: 1.25;
  text-align: center; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.queries .frame { display: block; border: 2px solid transparent; border-radius: 7px; padding: 1px;
  margin-bottom: 2px; }
.queries .right .frame { border-color: color-mix(in srgb, var(--right) 45%, transparent); }
.queries .wrong .frame { border: 2px dashed var(--wrong); border-radius: 0;
  background: var(--wrong-tint); }
.queries .right b { color: var(--right); }
.queries .wrong, .queries .wrong b { color: var(--wrong); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: .9rem; padding: 0; list-style: none; margin: 1rem 0; }
.pairs .side { display: grid; gap: .35rem; margin-top: .7rem; }
.pairs .shots img { width: 42px; }
.pairs .rate { font-weight: 620; font-variant-numeric: tabular-nums; }
@media (max-width: 620px) {
  main { padding: 1.5rem .9rem 3rem; }
  .class { grid-template-columns: 1fr; gap: .7rem; }
  .compare { grid-template-columns: 1fr !important; }
  th, td { padding: .45rem .7rem; }
}
@media print { .card, .tiles li, .scroll { break-inside: avoid; } details > * { display: block;
  } }
"""
