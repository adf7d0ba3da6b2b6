"""Pages of what was measured: one library of charts, one style, for all of them.

Read it in this order: `charts` (a chart as SVG), `page` (the skeleton and what stands in it),
`runs` (logs as they are read), `curves` (logs as lines), `panels` and `maps` (the parts of the
report), `report`. `simulation` and `modes` are the page of the three modes; `sheet` is a picture
of charts for documents. Every page has `chart.css`, `page.css`, `fit.js` and `hover.js` in it, the
report `maps.css` and `maps.js`, too.
"""
