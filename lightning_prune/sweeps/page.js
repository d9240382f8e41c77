// The page about a sweep: pictures, sorting, filtering, and which run is open. Texts of runs are only ever set as text.
"use strict";

const find = (selector, from = document) => from.querySelector(selector);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const picked = (name) => find(`input[name="${name}"]:checked`).value;

let figures = null; // {fronts: data -> cost -> points -> figure, runs: id -> name -> figure}, once unpacked
let cameFrom = null; // where the reader was when a run was opened

// Pictures

async function unpack(id) {
  const bytes = Uint8Array.from(atob(find(`#${id}`).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), title: { font: { size: 13 } } };
  const font = { family: style.fontFamily, size: 12.5, color: colour("--quiet") };
  const box = { bgcolor: colour("--card"), bordercolor: colour("--line") };
  const hoverlabel = { ...box, font: { ...font, color: colour("--ink") }, align: "left", namelength: -1 };
  const clear = "rgba(0,0,0,0)";
  const modebar = { bgcolor: clear, color: colour("--quiet"), activecolor: colour("--accent") };
  const shared = { font, hoverlabel, modebar, xaxis: axis, yaxis: axis, paper_bgcolor: clear, plot_bgcolor: clear };
  return { ...layout, autosize: true, template: { layout: shared } };
}

function draw(place, figure, data = figure.data) {
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
  return Plotly.react(place, structuredClone(data), themed(structuredClone(figure.layout)), config);
}

async function drawFront() {
  const place = find("#front");
  if (!figures || !place || find("#overview").hidden) return;
  const data = find("#dataset") ? find("#dataset").value : Object.keys(figures.fronts)[0];
  const figure = figures.fronts[data][picked("cost")][picked("points")];
  await draw(place, figure, figure.data.map(faded));
  if (place.dataset.ready) return;
  place.dataset.ready = "yes";
  place.on("plotly_click", (event) => openPoint(event.points[0].customdata));
}

function faded(trace) {
  if (!trace.customdata || trace.meta === "dense") return trace;
  const shown = new Set(all("#runs tbody:not([hidden])").flatMap((body) => [body.id, ...body.dataset.runs.split(" ")]));
  const selectedpoints = [...trace.customdata.keys()].filter((place) => shown.has(trace.customdata[place]));
  return { ...trace, selectedpoints, unselected: { marker: { opacity: 0.12 } } };
}

function drawRun(id) {
  if (!figures) return;
  for (const place of all(`#run-${id} [data-figure]`)) draw(place, figures.runs[id][place.dataset.figure]);
}

function openPoint(id) {
  if (!id.startsWith("group-")) {
    location.hash = `run=${id}`;
    return;
  }
  const body = document.getElementById(id);
  if (body.hidden) clearFilters();
  const button = find(".expand", body);
  if (button) expand(button, true);
  body.scrollIntoView({ block: "center" });
  (button || find("a", body)).focus({ preventScroll: true });
}

// The table

function value(body, column) {
  return body.rows[0].cells[column + 1].dataset.sort;
}

function compare(left, right) {
  const numbers = [Number(left), Number(right)];
  return numbers.every(Number.isFinite) ? numbers[0] - numbers[1] : left.localeCompare(right, undefined, { numeric: true });
}

function sort(button) {
  const heading = button.closest("th");
  const other = { ascending: "descending", descending: "ascending" };
  const order = heading.ariaSort ? other[heading.ariaSort] : button.dataset.first;
  for (const each of all("#runs thead th")) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const column = Number(button.dataset.column);
  const sign = order === "ascending" ? 1 : -1;
  const rank = (left, right) => {
    const [a, b] = [value(left, column), value(right, column)];
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last, whatever the order
    return sign * compare(a, b);
  };
  find("#runs").append(...all("#runs tbody").sort(rank));
}

function expand(button, open = button.ariaExpanded !== "true") {
  button.setAttribute("aria-expanded", String(open));
  for (const row of all("tr.seed", button.closest("tbody"))) row.hidden = !open;
}

function filter() {
  const words = find("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const facets = all("[data-facet]").filter((choice) => choice.value !== "*");
  const bodies = all("#runs tbody");
  for (const body of bodies) {
    const settings = JSON.parse(body.dataset.settings);
    const said = words.every((word) => body.dataset.search.includes(word));
    body.hidden = !said || !facets.every((choice) => `=${settings[choice.dataset.facet]}` === choice.value);
  }
  const shown = bodies.filter((body) => !body.hidden).length;
  find("#shown").textContent = `${shown} of ${bodies.length} configurations`;
  drawFront();
}

function clearFilters() {
  find("#filter").value = "";
  for (const choice of all("[data-facet]")) choice.value = "*";
  filter();
}

async function copy(button) {
  const code = find("code", button.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // a browser that grants no clipboard to files still copies a selection
    document.execCommand("copy");
  }
  button.textContent = "copied";
  setTimeout(() => (button.textContent = "copy"), 1500);
}

// Which run is open

function show() {
  const id = location.hash.startsWith("#run=") ? location.hash.slice(5) : "";
  const run = document.getElementById(`run-${id}`);
  const overview = find("#overview");
  if (run && !overview.hidden) cameFrom = { scroll: scrollY, focus: document.activeElement };
  for (const each of all("main")) each.hidden = each !== (run || overview);
  if (run) {
    scrollTo(0, 0);
    find("h1", run).focus();
    drawRun(id);
    return;
  }
  drawFront();
  if (location.hash === "#broken") find("#broken").scrollIntoView();
  else if (cameFrom) {
    scrollTo(0, cameFrom.scroll);
    cameFrom.focus.focus({ preventScroll: true });
  }
  cameFrom = null;
}

function click(event) {
  const button = event.target.closest("button");
  if (button) {
    if (button.dataset.column) sort(button);
    else if (button.matches(".expand")) expand(button);
    else if (button.matches(".copy")) copy(button);
    return;
  }
  const row = event.target.closest("#runs tbody tr");
  if (!row || event.target.closest("a") || String(getSelection())) return;
  if (row.dataset.run) location.hash = `run=${row.dataset.run}`;
  else expand(find(".expand", row));
}

async function start() {
  addEventListener("hashchange", show);
  document.addEventListener("click", click);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && find("#overview").hidden) location.hash = "";
  });
  if (find("#runs")) {
    find("#filter").addEventListener("input", filter);
    for (const each of all("[data-facet]")) each.addEventListener("change", filter);
    for (const each of all(".switches input, .switches select")) each.addEventListener("change", drawFront);
    filter();
  }
  show();
  try {
    const [plotly, data] = await Promise.all([unpack("plotly"), unpack("figures")]);
    document.head.append(Object.assign(document.createElement("script"), { textContent: plotly }));
    figures = JSON.parse(data);
  } catch (error) {
    find("#trouble").hidden = false;
    find("#trouble").textContent = `This browser cannot unpack the figures (${error.message}); one of 2023 or later can.`;
    return;
  }
  show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  document.documentElement.dataset.ready = "yes";
}

start();
