import { drawing, element } from "./elements.js";

const SHOWN = 20; // turns
const [WIDTH, HEIGHT] = [320, 168];
const LEFT = 38; // room for the scale
const WAIT = { top: 8, bottom: 104 }; // the upper part: how long one waited
const FACTOR = { top: 120, bottom: 160 }; // the lower part: real time factor
const STEPS_MS = [100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000];
const COLUMNS = ["Turn", "Endpointing", "First text", "First sound", "Real time factor", "Gaps"];

/** Draws the turns into `figure`, writes the last one into `summary` and all into `table`. */
export function showTimings(turns, { figure, summary, table }) {
  const drawn = drawing("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `Timings of the last ${turns.length} turns; the table below has the figures`,
  });
  drawn.append(...waits(turns), ...factors(turns));
  figure.replaceChildren(drawn);
  summary.replaceChildren(...figures(turns.at(-1)).flatMap(definition));
  table.replaceChildren(heading(), element("tbody", {}, ...turns.map(row)));
}

const slot = (WIDTH - LEFT) / SHOWN;
const left = (index) => LEFT + index * slot + 2;

function waits(turns) {
  const longest = Math.max(400, ...turns.map(waitedMs));
  const step = STEPS_MS.find((candidate) => longest / candidate <= 4) ?? longest;
  const top = Math.ceil(longest / step) * step;
  const height = (ms) => ((WAIT.bottom - WAIT.top) * ms) / top;
  return [
    ...scale(step, top, height),
    ...turns.flatMap((turn, index) => stack(turn, left(index), height)),
  ];
}

function scale(step, top, height) {
  const lines = [];
  for (let ms = 0; ms <= top; ms += step) {
    const y = WAIT.bottom - height(ms);
    lines.push(rule(y), label(y, top < 1000 ? `${ms} ms` : `${ms / 1000} s`));
  }
  return lines;
}

// From below: until the server knew that one had finished, until text came, until sound came.
function stack(turn, x, height) {
  const text = turn.firstTextMs ?? 0;
  const parts = [
    ["endpointing", turn.endpointingMs ?? 0],
    ["first-text", text],
    ["first-sound", Math.max(0, (turn.firstSoundMs ?? 0) - text)],
  ];
  let y = WAIT.bottom;
  return parts.map(([name, ms]) => {
    y -= height(ms);
    return bar(name, x, y, height(ms));
  });
}

function factors(turns) {
  const largest = Math.max(1.2, ...turns.map((turn) => turn.realTimeFactor ?? 0));
  const height = (factor) => ((FACTOR.bottom - FACTOR.top) * factor) / largest;
  const y = FACTOR.bottom - height(1);
  return [
    rule(FACTOR.bottom),
    label(FACTOR.bottom, "0"),
    rule(y, "limit"),
    label(y, "1×"),
    ...turns.map((turn, index) => {
      const tall = height(turn.realTimeFactor ?? 0);
      return bar("factor", left(index), FACTOR.bottom - tall, tall);
    }),
    ...turns.flatMap((turn, index) => gapMark(turn, left(index))),
  ];
}

function gapMark(turn, x) {
  if (!turn.gaps) return [];
  const place = { class: "gap", cx: x + (slot - 4) / 2, cy: (WAIT.bottom + FACTOR.top) / 2, r: 3 };
  return [drawing("circle", place)];
}

const bar = (name, x, y, height) =>
  drawing("rect", { class: name, x, y, width: slot - 4, height, rx: 1 });

const rule = (y, name = "rule") =>
  drawing("line", { class: name, x1: LEFT, x2: WIDTH, y1: y, y2: y });

const label = (y, text) => drawing("text", { x: LEFT - 5, y: y + 3, "text-anchor": "end" }, text);

function waitedMs(turn) {
  const reply = Math.max(turn.firstSoundMs ?? 0, turn.firstTextMs ?? 0);
  return (turn.endpointingMs ?? 0) + reply;
}

function heading() {
  const cells = COLUMNS.map((name) => element("th", { scope: "col" }, name));
  return element("thead", {}, element("tr", {}, ...cells));
}

function row(turn, index) {
  const cells = figures(turn).map(([, value]) => element("td", {}, value));
  return element("tr", {}, element("th", { scope: "row" }, `${index + 1}`), ...cells);
}

const definition = ([name, value]) => [element("dt", {}, name), element("dd", {}, value)];

function figures(turn) {
  const gaps = turn?.gaps ? `${turn.gaps} (${Math.round(turn.gapMs)} ms)` : "0";
  return [
    [COLUMNS[1], inMs(turn?.endpointingMs)],
    [COLUMNS[2], inMs(turn?.firstTextMs)],
    [COLUMNS[3], inMs(turn?.firstSoundMs)],
    [COLUMNS[4], turn?.realTimeFactor?.toFixed(2) ?? "–"],
    [COLUMNS[5], turn ? gaps : "–"],
  ];
}

const inMs = (value) => (value === null || value === undefined ? "–" : `${Math.round(value)} ms`);
