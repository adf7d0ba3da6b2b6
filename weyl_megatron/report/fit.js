// Where a chart's box is narrower than the chart, as on a phone, the chart is laid out anew: text
// and strokes keep their size, the curves are squeezed. The names at their ends go, since a legend
// has them; those of reference lines move above the lines.
const ROOM = 46; // pixels that a number below the axis takes
const LEAST = 120; // pixels of a box in which there is something to see
const EDGE = 10; // pixels right of the curves
const laidOut = new WeakMap(); // what a chart was before

function fit(svg) {
  const width = svg.getBoundingClientRect().width;
  if (width < LEAST) return;
  if (!laidOut.has(svg)) {
    const size = svg.getAttribute("viewBox").split(" ").map(Number);
    if (width > 0.9 * size[2]) return;
    laidOut.set(svg, {size, box: svg.dataset.box, markup: svg.innerHTML});
  }
  const {size, box, markup} = laidOut.get(svg);
  svg.innerHTML = markup;
  svg.dataset.box = box;
  svg.setAttribute("viewBox", size.join(" "));
  if (width <= 0.9 * size[2]) squeeze(svg, width, size);
}

function squeeze(svg, width, size) {
  const [left, right, top, base] = svg.dataset.box.split(",").map(Number);
  const edge = width - Math.min(EDGE, size[2] - right);
  const moved = x => x < left ? x : left + (x - left) * (edge - left) / (right - left);
  const move = (element, key) =>
    element.setAttribute(key, moved(+element.getAttribute(key)).toFixed(1));
  for (const element of svg.querySelectorAll("text")) move(element, "x");
  for (const element of svg.querySelectorAll("circle")) move(element, "cx");
  for (const element of svg.querySelectorAll("line"))
    for (const key of ["x1", "x2"]) move(element, key);
  for (const element of svg.querySelectorAll("polyline, polygon")) {
    const points = element.getAttribute("points");
    element.setAttribute("points", points.replace(/[^ ,]+(?=,)/g, x => moved(+x).toFixed(1)));
  }
  for (const mark of svg.querySelectorAll(".mark")) {
    const to = moved(+mark.dataset.at);
    mark.setAttribute("transform", "translate(" + (to - mark.dataset.at) + ")");
    mark.dataset.at = to;
  }
  const inner = svg.querySelector("svg");
  inner.setAttribute("width", edge - left);
  inner.setAttribute("viewBox", [left, top, edge - left, base - top].join(" "));
  thinNumbers(svg);
  for (const element of svg.querySelectorAll(".lead, .end:not(.of-rule)")) element.remove();
  for (const name of svg.querySelectorAll(".of-rule")) {
    name.setAttribute("x", edge);
    name.setAttribute("y", name.dataset.at - 5);
    name.setAttribute("text-anchor", "end");
  }
  svg.dataset.box = [left, edge, top, base].join(",");
  svg.setAttribute("viewBox", [0, 0, width, size[3]].join(" "));
}

// Takes away the numbers below the axis that would run into those before them.
function thinNumbers(svg) {
  let last = -Infinity;
  for (const number of svg.querySelectorAll(".tick[text-anchor=middle]")) {
    const x = +number.getAttribute("x");
    if (x - last < ROOM) number.remove();
    else last = x;
  }
}

function fitAll() {
  for (const svg of document.querySelectorAll("svg.chart")) fit(svg);
}
addEventListener("resize", fitAll);
fitAll();
