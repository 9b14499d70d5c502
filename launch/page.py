"""The report's page: a template for `str.format`, with its style sheet. No script, nothing from the network."""

from __future__ import annotations

_STYLE = """
:root { color-scheme: light dark;
  --paper: #f7f7f5; --card: #ffffff; --ink: #1d1e20; --soft: #666a70; --line: #e3e4e0; --grid: #ececea;
  --c0: #2563c9; --c1: #93b4e8; --c2: #1f8f6b; --c3: #8d55c7; --c4: #c2571a; --c5: #9a7b0a;
  --good: #1a7f4e; --fair: #9a6700; --bad: #c0322b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #141518; --card: #1d1f23; --ink: #e9eaec; --soft: #9aa0a8; --line: #303338; --grid: #2a2d31;
  --c0: #6ea8ff; --c1: #3f6197; --c2: #45c496; --c3: #bd90f0; --c4: #f0935c; --c5: #d6b64a;
  --good: #53c68c; --fair: #dcae4a; --bad: #f1776f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 18px 48px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 38px 0 12px; }
h3 { font-size: 14px; margin: 0 0 4px; }
p { margin: 8px 0; color: var(--soft); } header p { font-size: 16px; margin: 0 0 22px; overflow-wrap: anywhere; }
.good { color: var(--good); } .fair { color: var(--fair); } .bad { color: var(--bad); }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile, .card, .track, figure, pre, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; display: flex; flex-direction: column; color: var(--ink); }
.tile span, .tile small { color: var(--soft); font-size: 13px; }
.tile b { font-size: 23px; line-height: 1.3; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile.good b { color: var(--good); } .tile.fair b { color: var(--fair); } .tile.bad b { color: var(--bad); }
.tile.good b, .tile.fair b, .tile.bad b { font-size: 19px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { padding: 14px 14px 6px; min-width: 0; display: flex; flex-direction: column; }
@media (min-width: 860px) {
  .card.wide { grid-column: 1 / -1; display: grid; grid-template-columns: 330px minmax(0, 1fr); column-gap: 24px; }
  .card.wide h3 { grid-column: 1 / -1; } .card.wide .legend { flex-direction: column; }
  .card.wide svg { margin: 0; max-width: 600px; } }
.events { margin-top: 24px; } .events p { font-size: 13px; margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft); margin-bottom: 6px; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; font-weight: 600; }
.legend i { display: inline-block; width: 16px; border-top: 3px solid var(--c); margin-right: 5px;
  vertical-align: 4px; }
.legend i.dash { border-top: 2px dashed var(--c); }
svg { display: block; width: 100%; height: auto; overflow: visible; margin-top: auto; }
svg .grid { stroke: var(--grid); fill: none; }
svg .tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .reference { stroke-dasharray: 5 5; stroke-width: 1.6; }
svg .range { fill: var(--c); opacity: .18; }
svg .end { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; padding: 10px; } figure img { width: 100%; display: block; border-radius: 5px; }
figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; overflow-wrap: anywhere; }
.timeline { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px; }
.timeline .label { font-size: 13px; color: var(--soft); margin-bottom: 3px; }
.timeline .label b { color: var(--ink); display: inline-block; min-width: 1.4em; }
.timeline small { display: block; font-size: 12px; color: var(--soft); margin-top: 2px; overflow-wrap: anywhere; }
.track { position: relative; height: 18px; overflow: hidden; border-radius: 5px; }
.track i { position: absolute; top: 0; bottom: 0; }
.kept { background: var(--c0); } .save { background: var(--ink); }
.track .save { width: 2px; margin-left: -2px; }
.redone { background: repeating-linear-gradient(45deg, var(--c4) 0 4px, transparent 4px 8px); }
.key { font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 10px; margin: 0 5px 0 12px; border-radius: 2px; }
.key i:first-child { margin-left: 0; } .key .save { width: 2px; height: 12px; vertical-align: -1px; }
pre { padding: 14px; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--ink);
  white-space: pre-wrap; overflow-wrap: anywhere; border-left-width: 4px; margin: 16px 0 0; }
pre.audit { color: var(--ink); }
pre.good { border-left-color: var(--good); }
pre.fair { border-left-color: var(--fair); }
pre.bad { border-left-color: var(--bad); }
details { padding: 10px 14px; margin-bottom: 10px; } summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; font-size: 13px; margin-top: 8px; width: 100%; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-top: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; } td { overflow-wrap: anywhere; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }
@media print { details { display: none; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · tubelet</title>
<style>"""
    + _STYLE.replace("{", "{{").replace("}", "}}")
    + """</style>
</head>
<body><main>
<header><h1>{title}</h1><p>{lead}</p><div class="tiles">{tiles}</div></header>
{body}
<footer>Made by tubelet report, {made}.</footer>
</main></body>
</html>
"""
)
