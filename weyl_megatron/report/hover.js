// The values under the pointer, in every chart. A chart says in its data attributes where its box
// is and what its axes span; the values are read back from the points of its lines.
const LISTED = 14; // curves that are listed; of more, those nearest to the pointer
const NEAR = 5; // pixels from a mark within which it is named
const box = document.getElementById("values");
const dataOf = id => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const allSteps = dataOf("steps");
const ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"};
const escaped = text => text.replace(/[&<>"]/g, c => ENTITIES[c]);
const short = value => {
  const size = Math.abs(value);
  if (value === 0) return "0";
  return size < 1e-3 || size >= 1e5 ? value.toExponential(2) : String(+value.toPrecision(4));
};

// The logged step nearest to a place on the axis; a whole number where the page has no steps.
function nearestStep(step) {
  if (!allSteps) return Math.round(step);
  let low = 0, high = allSteps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (allSteps[middle] < step) low = middle + 1; else high = middle;
  }
  const isBefore = low > 0 && step - allSteps[low - 1] < allSteps[low] - step;
  return allSteps[isBefore ? low - 1 : low];
}

const parsed = new WeakMap();
function pointsOf(line) {
  if (!parsed.has(line)) {
    const pairs = line.getAttribute("points").split(" ").filter(Boolean);
    parsed.set(line, pairs.map(pair => pair.split(",").map(Number)).map(([x, y]) => ({x, y})));
  }
  return parsed.get(line);
}

// The point of every curve that is nearest to x; a curve with gaps is several lines of one name.
function nearestPoints(svg, x) {
  const curves = new Map();
  for (const line of svg.querySelectorAll("polyline:not(.faint)")) {
    const key = line.dataset.name + line.style.stroke;
    for (const point of pointsOf(line)) {
      const best = curves.get(key);
      if (!best || Math.abs(point.x - x) < Math.abs(best.point.x - x))
        curves.set(key, {point, line});
    }
  }
  return [...curves.values()];
}

function valuesAt(svg, event) {
  const [left, right, top, base] = svg.dataset.box.split(",").map(Number);
  const [x0, x1] = svg.dataset.x.split(",").map(Number);
  const [low, high, scale] = svg.dataset.y.split(",");
  const toChart = svg.getScreenCTM().inverse();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(toChart);
  if (at.x < left || at.x > right) return null;
  const nearest = nearestPoints(svg, at.x);
  const closer = (a, b) => Math.abs(a.point.x - at.x) <= Math.abs(b.point.x - at.x) ? a : b;
  const cursor = nearest.length ? nearest.reduce(closer).point.x : at.x;
  nearest.sort((a, b) => Math.abs(a.point.y - at.y) - Math.abs(b.point.y - at.y));
  const listed = nearest.slice(0, LISTED).sort((a, b) => a.point.y - b.point.y);
  const rows = listed.map(({point, line}) => {
    const f = (base - point.y) / (base - top);
    const value = scale === "log" ? low * Math.pow(high / low, f) : +low + f * (high - low);
    return [line.dataset.name, line.style.stroke, short(value)];
  });
  for (const mark of svg.querySelectorAll(".mark"))
    if (Math.abs(mark.dataset.at - at.x) <= NEAR)
      rows.push([mark.dataset.name, mark.style.fill, ""]);
  const step = nearestStep(x0 + (cursor - left) / (right - left) * (x1 - x0));
  return {cursor, step, rows, more: nearest.length - listed.length, top, base};
}

function place(event) {
  box.style.display = "block";
  const overRight = event.clientX + 18 + box.offsetWidth > innerWidth;
  const left = overRight ? event.clientX - 14 - box.offsetWidth : event.clientX + 18;
  const top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8);
  box.style.left = Math.max(4, left) + "px";
  box.style.top = Math.max(4, top) + "px";
}

function show(svg, event) {
  const shown = valuesAt(svg, event);
  if (!shown || !shown.rows.length) return hide(svg);
  let cursor = svg.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
  }
  for (const key of ["x1", "x2"]) cursor.setAttribute(key, shown.cursor);
  cursor.setAttribute("y1", shown.top);
  cursor.setAttribute("y2", shown.base);
  const rows = shown.rows.map(([name, color, value]) => "<tr><th><i style='background:" + color
    + "'></i>" + escaped(name) + "</th><td>" + value + "</td></tr>");
  box.innerHTML = "<b>" + escaped(svg.dataset.along) + " " + shown.step + "</b><table>"
    + rows.join("") + "</table>"
    + (shown.more ? "and " + shown.more + " farther from the pointer" : "");
  place(event);
}

function hide(element) {
  box.style.display = "none";
  element.querySelector?.(".cursor")?.remove();
}

for (const svg of document.querySelectorAll("svg.chart")) {
  svg.addEventListener("pointermove", event => show(svg, event));
  svg.addEventListener("pointerleave", () => hide(svg));
}
