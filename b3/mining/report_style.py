"""The fixed parts of the report: how to read it, and its style sheet."""

from __future__ import annotations

INTRODUCTION = """<div class="intro"><p>An embedding model is trained with batches of pairs: each <b>query</b> must find
its own <b>target</b> among the targets of all rows in its batch. Rows drawn at random make this too easy to learn
from. Mining therefore puts rows together that are hard to tell apart. This page shows how well that worked.</p>
<dl><dt>Teacher</dt><dd>the model whose similarities (cosine, from -1 to 1) rank all targets for each query; rank 0 is
the most similar one. The model to be trained has not been asked.</dd>
<dt>Window, hard negative</dt><dd>the window is a range of those ranks. A target inside it is a hard negative of the
query: similar enough to be mistaken, low enough to be wrong most likely.</dd>
<dt>Community</dt><dd>a group of rows, all of one size, chosen so that the members' targets are hard negatives of each
other's queries. A batch consists of whole communities.</dd>
<dt>Likely false negative</dt><dd>another member's target that the teacher ranks above the window, or scores above the
query's own target: it may well be a right answer, and training would push it away.</dd>
<dt>Teacher mass captured</dt><dd>how near a query's community comes to the hardest one possible, in which all other
members have the best-ranked targets from the start of the window on (100 %); near targets count far more than distant
ones. The higher it is, the closer training on the batch is to training on all rows at once
(arXiv 2505.11293, Theorem 1).</dd></dl>
<p><b>Good</b> is: many more hard negatives and much more teacher mass than in random communities and than by the
paper's recipe (mutual edges, METIS with its defaults), while likely false negatives stay few
(harder communities always hold somewhat more of them).</p></div>"""

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;margin:0 0 12px}h2{font-size:21px;margin:52px 0 2px;padding-top:18px;border-top:2px solid #cbd2d9}
h3{font-size:17px;margin:34px 0 4px}h4{font-size:14.5px;margin:22px 0 8px}
h4 small{font-weight:400;color:#616e7c;margin-left:6px}
p{margin:6px 0 10px;max-width:860px}
a{color:#1c5d99;text-decoration:none}.up{font-size:12.5px;font-weight:400;margin-left:10px}
.facts{color:#616e7c;font-size:13.5px;margin:2px 0 14px;max-width:none}
.intro{background:#f5f7f9;border-radius:8px;padding:8px 18px;margin:0 0 20px;font-size:14px}
.intro p{max-width:none}dl{display:grid;grid-template-columns:170px 1fr;gap:4px 14px;margin:8px 0}
dt{font-weight:600}dd{margin:0}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:0 0 8px}
th,td{padding:5px 18px 5px 0;text-align:right;border-bottom:1px solid #edf0f2;vertical-align:top}
th{font-weight:400}th:first-child{text-align:left}thead th{color:#616e7c;font-size:12.5px;vertical-align:bottom}
th small{color:#9aa5b1;margin-left:6px}
.contents{width:100%}.contents th,.contents td{padding-right:12px}
.pair{display:flex;flex-wrap:wrap;gap:20px 48px;align-items:flex-start;margin:18px 0 10px}
figure{margin:0;flex:1 1 380px;max-width:500px}svg{width:100%;height:auto;display:block;margin:2px 0}
svg text{font-size:11px;fill:#616e7c;text-anchor:middle}svg .end{text-anchor:end}
figcaption{font-size:12.5px;color:#616e7c}figcaption b{color:#1f2933;font-size:13.5px}
.legend span{margin-right:12px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:4px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));gap:8px}
.card{border:1px solid #e4e7eb;border-radius:6px;overflow:hidden;display:flex;flex-direction:column;
font-size:12px;line-height:1.35}
.side{padding:7px 8px;display:flex;flex-direction:column;align-items:center;gap:4px;text-align:center;
overflow-wrap:anywhere}
.side img{max-width:78px;max-height:78px;padding:3px;background:#fff;border-radius:4px}.side small{color:#616e7c}
.target{background:#f1f7f4}.doubt{background:#fdf4ee}
.card .target{flex:1;justify-content:center}
.card .side:not(.target){min-height:40px;justify-content:center}
.sheet.texts{grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}
.texts .side{text-align:left;align-items:flex-start;padding:6px 10px}
.texts .card .target{justify-content:flex-start}.texts .card .side:not(.target){font-weight:600;min-height:0}
.sheet.hubs{grid-template-columns:repeat(auto-fill,minmax(190px,1fr))}
.triples{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:#e4e7eb;border:1px solid #e4e7eb;
border-radius:6px;overflow:hidden;font-size:12.5px;line-height:1.4;max-width:920px;margin:0 0 14px}
.triples>*{background:#fff;justify-content:center}.triples>b{padding:5px 10px;font-weight:600;text-align:center}
.triples.texts>.side{text-align:left;align-items:flex-start;padding:7px 12px}
.triples>.target{background:#f1f7f4}.triples>.doubt{background:#fdf4ee}
.hits{font-size:11px;color:#9a4a1c;background:#fdf4ee;text-align:center;padding:2px}.bad{color:#9aa5b1}
""".replace("\n", "")
