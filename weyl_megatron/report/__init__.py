"""Pages of what was measured: one library of charts, one style, for all of them.

Read it in this order: `charts` (a chart as SVG), `page` (the skeleton and what stands in it),
`points`, `series` and `groups` (numbers, of which there may be too many to keep), `run` and `runs`
(a log, and how it is read; `events` is what it holds beside numbers), `curves` (logs as lines),
`panels`, `tables` and `maps` (the parts of the report), `summary` (runs in few numbers), `report`.
`simulation` and `modes` are the page of the three modes; `sheet` is a picture of charts for
documents. Every page has `chart.css`, `page.css`, `fit.js` and `hover.js` in it, the report also
`maps.css` and `maps.js`.
"""
