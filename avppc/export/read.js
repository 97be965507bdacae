"use strict";
// The page's data, see read.py: times in seconds, probabilities in thousandths, places in pixels of the video.
const data = JSON.parse(document.getElementById("data").textContent);
const film = document.getElementById("film");
const box = document.getElementById("box");
const said = document.getElementById("said");
const bars = document.getElementById("bars");
const mouth = document.getElementById("mouth").getContext("2d");
const timeline = document.getElementById("timeline");
const overview = document.getElementById("overview");
const buttons = [...document.querySelectorAll("#said button")];
const starts = data.found.map((item) => item.start), moments = data.found.map((item) => item.at);
const ROW = 24, LANE = 22, MOST_ROWS = 9, LEFT = 8, LEAST = 0.015;
let view = null; // the span of time that is drawn
let marked = -1; // the word that is being said
let untouched = true; // before the first play, a moment that shows something

// The number of the last entry of a growing list that is not above a value; -1 if the first one is.
function lastUpTo(list, value) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] <= value) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// The number of the window whose middle is nearest to a time; -1 if none is near.
function windowAt(time) {
  const before = lastUpTo(data.times, time);
  let best = -1, distance = 0.75 * data.step + 0.001;
  for (const place of [before, before + 1]) {
    const away = Math.abs((data.times[place] ?? Infinity) - time);
    if (away < distance) [best, distance] = [place, away];
  }
  return best;
}

// Centre and half sides of the mouth's box: x, y, the vector to the right side and the one to the lower side.
function boxAt(time) {
  if (data.box) {
    const [left, top, right, bottom] = data.box;
    return [(left + right) / 2, (top + bottom) / 2, (right - left) / 2, 0, 0, (bottom - top) / 2];
  }
  const place = lastUpTo(data.track.times, time + 0.001);
  if (place < 0 || time - data.track.times[place] > 0.1) return null;
  const [x, y, a, b] = data.track.places[place];
  return [x, y, a / 2, b / 2, -b / 2, a / 2];
}

function svg(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function drawBox(time) {
  const place = boxAt(time);
  const corners = [];
  if (place) {
    const [x, y, rightX, rightY, downX, downY] = place;
    for (const [across, down] of [[-1, -1], [1, -1], [1, 1], [-1, 1]])
      corners.push(`${x + across * rightX + down * downX},${y + across * rightY + down * downY}`);
  }
  box.setAttribute("points", corners.join(" "));
  mouth.setTransform(1, 0, 0, 1, 0, 0);
  mouth.clearRect(0, 0, 192, 192);
  if (!place || film.readyState < 2) return;
  const [x, y, rightX, rightY, downX, downY] = place;
  const shrink = film.videoWidth / data.width; // the film may be smaller than the video
  const across = 96 / Math.hypot(rightX, rightY), down = 96 / Math.hypot(downX, downY);
  const angle = Math.atan2(rightY, rightX);
  mouth.translate(96, 96);
  mouth.scale(across, down);
  mouth.rotate(-angle);
  mouth.translate(-x, -y);
  mouth.scale(1 / shrink, 1 / shrink);
  mouth.filter = "grayscale(1)";
  mouth.drawImage(film, 0, 0);
}

function drawBars(time) {
  const place = windowAt(time);
  bars.replaceChildren();
  if (place < 0) {
    const item = document.createElement("li");
    const half = data.times[0].toFixed(2);
    item.textContent = time < data.times[0] ? `nothing is read before ${half} s` : "nothing is read here";
    bars.append(item);
    return;
  }
  data.words[place].forEach((word, rank) => {
    const share = data.shares[place][rank] / 10;
    const item = document.createElement("li"), bar = document.createElement("i");
    bar.style.width = `${share}%`;
    const name = document.createElement("span"), number = document.createElement("span");
    name.textContent = data.vocabulary[word];
    number.textContent = `${share.toFixed(share < 10 ? 1 : 0)} %`;
    item.append(bar, name, number);
    bars.append(item);
  });
}

// Which span to draw: all of a short video, else the page of it in which a time lies.
function spanAt(time) {
  const width = timeline.clientWidth || 900;
  const most = Math.min(12, Math.max(3, width / 90));
  if (data.seconds <= 1.3 * most) return [0, data.seconds];
  const first = Math.floor(time / most) * most;
  return [first, Math.min(first + most, data.seconds)];
}

function drawTimeline(span) {
  const width = timeline.clientWidth || 900, gutter = width < 500 ? 62 : 92;
  const [from, to] = span;
  const x = (time) => gutter + ((time - from) / (to - from)) * (width - gutter - LEFT);
  view = { from, to, gutter, width };
  timeline.replaceChildren();
  let y = 0;
  const label = (text, height) => svg(timeline, "text", { x: 0, y: y + height / 2 + 4, class: "quiet" }, text);
  const lane = (name, items, kind) => {
    label(name, LANE);
    for (const item of items) {
      if (item.end < from || item.start > to) continue;
      const left = x(Math.max(item.start, from)), right = x(Math.min(item.end, to));
      const shape = { x: left + 0.5, y: y + 1, width: Math.max(right - left - 1, 2), height: LANE - 3, rx: 3 };
      svg(timeline, "rect", { ...shape, class: kind(item) });
      if (right - left > 6.5 * item.word.length)
        svg(timeline, "text", { x: (left + right) / 2, y: y + LANE / 2 + 3 }, item.word);
    }
    y += LANE;
  };
  lane("read", data.found, (item) => (item.share < data.sure ? "word unsure" : "word"));
  if (data.truth) lane("said", data.truth, (item) => (item.found ? "truth" : "truth wrong"));
  y += 6;
  for (const { word, points } of rowsOf(from, to)) {
    svg(timeline, "line", { x1: gutter, x2: width - LEFT, y1: y + ROW - 2, y2: y + ROW - 2, class: "rule" });
    const name = data.vocabulary[word];
    svg(timeline, "text", { x: 0, y: y + ROW - 7 }, name.length > 13 ? `${name.slice(0, 12)}…` : name);
    for (const run of points) {
      const path = run.map(([time, share]) => `L${x(time).toFixed(1)} ${(y + ROW - 2 - share * (ROW - 4)).toFixed(1)}`);
      const first = x(run[0][0] - data.step).toFixed(1), last = x(run[run.length - 1][0] + data.step).toFixed(1);
      svg(timeline, "path", { d: `M${first} ${y + ROW - 2}${path.join("")}L${last} ${y + ROW - 2}Z`, class: "area" });
    }
    y += ROW;
  }
  if (data.late) y = drawLate(x, from, to, y + 8, gutter, width);
  y += 4;
  const step = [0.5, 1, 2, 5].find((seconds) => (x(from + seconds) - x(from)) > 55) ?? 10;
  for (let tick = Math.ceil(from / step) * step; tick <= to + 1e-6; tick += step) {
    svg(timeline, "line", { x1: x(tick), x2: x(tick), y1: y, y2: y + 5, class: "rule" });
    svg(timeline, "text", { x: x(tick), y: y + 18, "text-anchor": "middle", class: "quiet" }, `${+tick.toFixed(1)} s`);
  }
  view.head = svg(timeline, "line", { y1: 0, y2: y + 5, class: "head" });
  timeline.setAttribute("height", y + 24);
  timeline.setAttribute("viewBox", `0 0 ${width} ${y + 24}`);
  drawOverview();
}

// The words that are most probable somewhere in a span, in the order in which they are; each with its runs of points.
function rowsOf(from, to) {
  const rows = new Map();
  const first = Math.max(lastUpTo(data.times, from), 0);
  for (let place = first; place < data.times.length && data.times[place] <= to; place++) {
    const time = data.times[place];
    if (time < from) continue;
    data.words[place].forEach((word, rank) => {
      const share = data.shares[place][rank] / 1000;
      if (share < LEAST) return;
      if (!rows.has(word)) rows.set(word, { word, points: [], best: 0, when: 0, last: -2 });
      const row = rows.get(word);
      if (place - row.last > 1) row.points.push([]);
      row.points[row.points.length - 1].push([time, share]);
      row.last = place;
      if (share > row.best) [row.best, row.when] = [share, time];
    });
  }
  const chosen = [...rows.values()].sort((one, other) => other.best - one.best).slice(0, MOST_ROWS);
  return chosen.sort((one, other) => one.when - other.when);
}

function drawLate(x, from, to, y, gutter, width) {
  const height = 34, reach = data.late.reach;
  svg(timeline, "text", { x: 0, y: y + height / 2 + 4, class: "quiet" }, width < 500 ? "sound" : "sound late");
  svg(timeline, "line", { x1: gutter, x2: width - LEFT, y1: y + height / 2, y2: y + height / 2, class: "rule" });
  let path = "", pen = "M";
  data.late.times.forEach((time, place) => {
    const late = data.late.values[place];
    if (late === null || time < from - 1 || time > to + 1) { pen = "M"; return; }
    const inside = Math.min(Math.max(time, from), to);
    path += `${pen}${x(inside).toFixed(1)} ${(y + height / 2 - (late / reach) * (height / 2 - 2)).toFixed(1)}`;
    pen = "L";
  });
  if (path.includes("L")) svg(timeline, "path", { d: path, class: "late" });
  for (const late of [reach, -reach])
    svg(timeline, "text", { x: width - LEFT, y: y + (late > 0 ? 9 : height), "text-anchor": "end", class: "quiet" }, `${late > 0 ? "+" : "−"}${reach} ms`);
  return y + height;
}

function drawOverview() {
  const whole = view.to - view.from >= data.seconds;
  overview.toggleAttribute("hidden", whole);
  overview.replaceChildren();
  if (whole) return;
  const width = overview.clientWidth || 900, x = (time) => (time / data.seconds) * width;
  overview.setAttribute("viewBox", `0 0 ${width} 26`);
  for (const item of data.found)
    svg(overview, "line", { x1: x(item.at), x2: x(item.at), y1: 18 - 14 * item.share, y2: 20, class: "mark" });
  svg(overview, "line", { x1: 0, x2: width, y1: 20, y2: 20, class: "rule" });
  svg(overview, "rect", { x: x(view.from), y: 0, width: Math.max(x(view.to) - x(view.from), 3), height: 22, class: "view" });
  view.small = svg(overview, "line", { y1: 0, y2: 22, class: "head" });
}

function show() {
  const time = film.currentTime;
  document.getElementById("clock").textContent = time.toFixed(2);
  const span = spanAt(Math.min(time, data.seconds - 1e-3));
  if (!view || span[0] !== view.from || span[1] !== view.to) drawTimeline(span);
  const x = view.gutter + ((time - view.from) / (view.to - view.from)) * (view.width - view.gutter - LEFT);
  for (const name of ["x1", "x2"]) {
    view.head.setAttribute(name, x);
    view.small?.setAttribute(name, (time / data.seconds) * (overview.clientWidth || 900));
  }
  drawBox(time);
  drawBars(time);
  const last = lastUpTo(starts, time), now = last >= 0 && time < data.found[last].end ? last : -1;
  if (now === marked) return;
  buttons[marked]?.classList.remove("now");
  buttons[now]?.classList.add("now");
  if (now >= 0) said.scrollTop = buttons[now].offsetTop - said.offsetTop - said.clientHeight / 2;
  marked = now;
}

function seek(time) {
  untouched = false;
  film.currentTime = Math.min(Math.max(time, 0), data.seconds);
}

function follow() {
  show();
  if (!film.paused && !film.ended) requestAnimationFrame(follow);
}

function nextWord(direction) {
  const near = lastUpTo(moments, film.currentTime + 0.01 * direction), place = direction > 0 ? near + 1 : near;
  if (place >= 0 && place < moments.length) seek(moments[place]);
}

for (const event of ["loadeddata", "seeked", "timeupdate", "pause"]) film.addEventListener(event, show);
film.addEventListener("play", () => {
  if (untouched) film.currentTime = 0;
  untouched = false;
  follow();
});
timeline.addEventListener("click", (event) => {
  const place = event.clientX - timeline.getBoundingClientRect().left;
  seek(view.from + ((place - view.gutter) / (view.width - view.gutter - LEFT)) * (view.to - view.from));
});
overview.addEventListener("click", (event) => {
  const shape = overview.getBoundingClientRect();
  seek(((event.clientX - shape.left) / shape.width) * data.seconds);
});
buttons.forEach((button) => button.addEventListener("click", () => seek(Number(button.dataset.time))));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (direction && event.shiftKey) nextWord(direction);
  else if (direction) seek(film.currentTime + direction / data.fps);
  else if (event.key === " " && !event.target.closest("button, summary, video")) film.paused ? film.play() : film.pause();
  else return;
  event.preventDefault();
}, true);
addEventListener("resize", () => { view = null; show(); });
film.addEventListener("seeking", () => { if (film.currentTime !== (moments[0] ?? 0)) untouched = false; });
film.currentTime = moments[0] ?? 0;
show();
