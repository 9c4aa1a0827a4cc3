"use strict";
// The rank history: one heatmap a module kind, a tip for the cell under the pointer or the keyboard's cursor, and the
// step slider of the table of layers. Text from the run only ever becomes text (textContent, fillText).
(() => {
  const byId = (id) => document.getElementById(id);
  const { steps, score, kinds } = JSON.parse(byId("history-data").textContent);
  const tip = byId("tip");
  const BOTTOM = 34, GAP = 6;

  const matrices = kinds.flatMap((kind) =>
    kind.rows.map(([name, label, ranks, scores]) => ({ kind: kind.name, name, label, ranks, scores })));
  const changeOf = (matrix, column) => (column ? matrix.ranks[column] - matrix.ranks[column - 1] : null);
  const signed = (value) => (value > 0 ? `+${value}` : value < 0 ? `−${-value}` : "±0");

  const valueOf = {
    rank: (matrix, column) => matrix.ranks[column],
    score: (matrix, column) => matrix.scores[column],
    change: changeOf,
  };

  // ---- Colours: ramps are lists of hexadecimal colours in the style sheet, so that they follow the theme.
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const parse = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

  function colourAt(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const mixed = stops[low].map((part, i) => Math.round(part + (stops[low + 1][i] - part) * (place - low)));
    return `rgb(${mixed.join(" ")})`;
  }

  function extent(mode) {
    let low = Infinity, high = -Infinity;
    for (const matrix of matrices) {
      for (let column = 0; column < steps.length; column++) {
        const value = valueOf[mode](matrix, column);
        if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
      }
    }
    return [low, high];
  }

  function scaleOf(mode) {
    let [low, high] = extent(mode);
    let ramp = "--sequential";
    if (mode !== "score") {
      const starts = matrices.map((matrix) => matrix.ranks[0]).sort((a, b) => a - b);
      const middle = mode === "rank" ? starts[starts.length >> 1] : 0;
      const spread = Math.max(1, middle - low, high - middle);
      [low, high, ramp] = [middle - spread, middle + spread, "--diverging"];
    }
    const colours = style(ramp).split(/\s+/);
    const stops = colours.map(parse);
    return {
      low, high, colours,
      colour: (value) => colourAt(stops, high > low ? (value - low) / (high - low) : 0.5),
    };
  }

  let mode = "rank", scale;

  function showScale() {
    const known = Number.isFinite(scale.low) && Number.isFinite(scale.high);
    const text = (value) => (known ? (mode === "change" ? signed(value) : String(+value.toPrecision(3))) : "–");
    byId("scale-low").textContent = text(mode === "rank" ? Math.max(scale.low, 0) : scale.low);
    byId("scale-high").textContent = text(scale.high);
    byId("scale-bar").style.background = `linear-gradient(to right, ${scale.colours.join(", ")})`;
  }

  // ---- One panel: a heading and a canvas that takes the pointer and the keyboard.
  function makePanel(kind, rows) {
    const canvas = document.createElement("canvas");
    const isNamed = rows.some((row) => row.label === row.name);
    const rowHeight = Math.min(16, Math.max(1, Math.floor(640 / rows.length)));
    const height = Math.max(24, rows.length * rowHeight);
    const state = { cell: null, left: 0, width: 0 };

    const sum = (column) => rows.reduce((total, row) => total + row.ranks[column], 0);
    const section = document.createElement("section");
    const heading = document.createElement("h3");
    heading.textContent = `${kind}: ${sum(0)} → ${sum(steps.length - 1)}`;
    section.append(heading, canvas);
    if (isNamed) section.className = "wide";
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "heatmap");
    canvas.setAttribute("aria-label", `${kind}: ranks of ${rows.length} matrices over ${steps.length - 1} changes`);
    canvas.style.height = `${height + BOTTOM}px`;
    byId("history").append(section);

    const cellWidth = () => (state.width - state.left) / steps.length;
    const x = (column) => Math.round(state.left + column * cellWidth());
    const y = (row) => Math.round((row * height) / rows.length);

    function shorten(pen, text, width) {
      if (pen.measureText(text).width <= width) return text;
      let end = text.length;
      while (end > 1 && pen.measureText("…" + text.slice(-end)).width > width) end--;
      return "…" + text.slice(-end);
    }

    function labelRows(pen) {
      pen.font = "11px system-ui, sans-serif";
      const most = Math.min(320, state.width * 0.45);
      const labels = rows.map((row) => shorten(pen, row.label, most));
      state.left = Math.max(...labels.map((label) => pen.measureText(label).width)) + GAP;
      pen.fillStyle = style("--muted");
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      const every = Math.max(1, Math.ceil(12 / (height / rows.length)));
      for (let row = 0; row < rows.length; row += every) {
        pen.fillText(labels[row], state.left - GAP, (y(row) + y(row + 1)) / 2);
      }
    }

    function labelSteps(pen) {
      pen.textBaseline = "top";
      pen.textAlign = "center";
      const half = pen.measureText(steps[steps.length - 1].toLocaleString("en")).width / 2;
      const every = Math.max(1, Math.ceil((2 * half + 12) / cellWidth()));
      for (let column = 0; column < steps.length; column += every) {
        const middle = (x(column) + x(column + 1)) / 2;
        pen.fillText(steps[column].toLocaleString("en"), Math.min(middle, state.width - half), height + GAP);
      }
      pen.textAlign = "right";
      pen.fillText("step", state.width, height + GAP + 14);
    }

    function draw() {
      const ratio = window.devicePixelRatio || 1;
      state.width = canvas.clientWidth;
      canvas.width = Math.round(state.width * ratio);
      canvas.height = Math.round((height + BOTTOM) * ratio);
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      labelRows(pen);
      labelSteps(pen);
      const line = height / rows.length >= 6 ? 1 : 0;
      rows.forEach((matrix, row) => {
        for (let column = 0; column < steps.length; column++) {
          const value = valueOf[mode](matrix, column);
          pen.fillStyle = value === null ? style.missing : scale.colour(value);
          pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row) - line);
        }
      });
      if (state.cell) outline(pen, ...state.cell);
    }

    function outline(pen, row, column) {
      const box = [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
      pen.lineWidth = 2;
      pen.strokeStyle = style("--ink");
      pen.strokeRect(box[0] - 1, box[1] - 1, box[2] + 2, box[3] + 2);
    }

    function select(row, column) {
      state.cell = [row, column];
      draw();
      const frame = canvas.getBoundingClientRect();
      showTip(rows[row], column, frame.left + x(column), frame.left + x(column + 1), frame.top + y(row + 1));
    }

    function leave() {
      state.cell = null;
      draw();
      tip.hidden = true;
    }

    canvas.addEventListener("pointermove", (event) => {
      const row = Math.floor((event.offsetY * rows.length) / height);
      const column = Math.floor((event.offsetX - state.left) / cellWidth());
      const inside = row >= 0 && row < rows.length && column >= 0 && column < steps.length;
      if (!inside) { if (state.cell) leave(); return; }
      if (!state.cell || state.cell[0] !== row || state.cell[1] !== column) select(row, column);
    });
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) select(0, steps.length - 1); });
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      const [row, column] = state.cell || [0, steps.length - 1];
      const moves = {
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
        Home: [row, 0], End: [row, steps.length - 1],
      };
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
      select(within(moves[event.key][0], rows.length), within(moves[event.key][1], steps.length));
    });
    new ResizeObserver(() => { if (canvas.clientWidth !== state.width) draw(); }).observe(canvas);
    return draw;
  }

  // ---- The tip, beside the cell, within the window.
  function showTip(matrix, column, left, right, bottom) {
    const rank = matrix.ranks[column];
    const moved = column ? `, ${signed(changeOf(matrix, column))} since step ${steps[column - 1].toLocaleString("en")}` : "";
    const value = matrix.scores[column];
    const lines = [
      matrix.name,
      column ? `after the change at step ${steps[column].toLocaleString("en")}` : "at the start",
      `rank ${rank}${moved}`,
      `${score} before the change: ${value === null ? "–" : value}`,
    ];
    tip.replaceChildren(...lines.slice(0, column ? 4 : 3).map((line) => {
      const p = document.createElement("p");
      p.textContent = line;
      return p;
    }));
    tip.hidden = false;
    const frame = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - frame.width - 8;
    const beside = right + GAP > room ? left - frame.width - GAP : right + GAP;
    const below = Math.min(bottom + GAP, window.innerHeight - frame.height - 8);
    tip.style.left = `${Math.max(8, beside) + window.scrollX}px`;
    tip.style.top = `${below + window.scrollY}px`;
  }

  // ---- The table of layers at any step.
  function followSlider() {
    const slider = byId("layers-step");
    if (!slider) return;
    byId("layers-controls").hidden = false;
    const cells = [...document.querySelectorAll("td[data-matrix]")];
    const [low, high] = extent("rank");
    slider.addEventListener("input", () => {
      const column = Number(slider.value);
      byId("layers-said").textContent = steps[column].toLocaleString("en");
      slider.setAttribute("aria-valuetext", `step ${steps[column]}`);
      for (const cell of cells) {
        const rank = matrices[Number(cell.dataset.matrix)].ranks[column];
        cell.textContent = rank;
        cell.style.setProperty("--height", (rank - low) / Math.max(1, high - low));
      }
      for (const cell of document.querySelectorAll("td.sum")) {
        const row = [...cell.parentElement.querySelectorAll("td[data-matrix]")];
        cell.textContent = row.reduce((total, one) => total + Number(one.textContent), 0);
      }
    });
  }

  const panels = [];
  function redraw() {
    scale = scaleOf(mode);
    style.missing = style("--missing");
    showScale();
    for (const draw of panels) draw();
  }

  byId("history-controls").hidden = false;
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.addEventListener("change", () => { mode = input.value; redraw(); });
  }
  scale = scaleOf(mode);
  let first = 0;
  for (const { name, rows } of kinds) {
    panels.push(makePanel(name, matrices.slice(first, first + rows.length)));
    first += rows.length;
  }
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  followSlider();
})();
