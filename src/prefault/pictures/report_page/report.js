"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
  const LEVEL = new Map([...ALPHABET].map((letter, level) => [letter, level]));
  const TOP = 63, ROW = 26, GAP = 7;

  // --- words

  const size = (bytes) => {
    if (bytes < 1024) return bytes + (bytes === 1 ? " byte" : " bytes");
    let value = bytes, unit = -1;
    do { value /= 1024; unit += 1; } while (value >= 1023.95 && unit < 5);
    return value.toFixed(1) + " " + ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
  };
  const percent = (part, whole) => {
    let share = whole > 0 ? 100 * part / whole : 100;
    if (share > 0 && share < 100) share = Math.min(Math.max(share, 0.1), 99.9);
    return share.toFixed(1) + " %";
  };

  // --- colours: read from the style sheet, so that light and dark have one place

  let ramp = [], hatch = "", line = "", focus = "", faint = "";
  const channels = (name) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  };
  const readColours = () => {
    const stops = [1, 2, 3, 4].map((at) => channels("--level-" + at));
    const mixed = (position) => {
      const at = Math.min(2, Math.floor(position)), part = position - at;
      return stops[at].map((low, index) => Math.round(low + (stops[at + 1][index] - low) * part));
    };
    ramp = Array.from({length: TOP + 1}, (_, level) =>
      "rgb(" + (level === 0 ? channels("--level-0") : mixed(3 * (level - 1) / (TOP - 1))).join(",") + ")");
    const style = getComputedStyle(document.documentElement);
    [hatch, line, focus, faint] = ["--hatch", "--line", "--focus", "--faint"].map((name) => style.getPropertyValue(name).trim());
    for (const [name, paint] of [
      ["none", (pen, width, height) => { pen.fillStyle = ramp[0]; pen.fillRect(0, 0, width, height); }],
      ["ramp", (pen, width, height) => {
        for (let level = 1; level <= TOP; level += 1) {
          pen.fillStyle = ramp[level];
          pen.fillRect((level - 1) * width / TOP, 0, width / TOP + 1, height);
        }
      }],
      ["unknown", hatched],
      ["gap", (pen, width, height) => dotted(pen, 0, height)],
    ]) {
      const canvas = element("key-" + name), pen = canvas.getContext("2d");
      pen.clearRect(0, 0, canvas.width, canvas.height);
      paint(pen, canvas.width, canvas.height);
    }
  };
  const hatched = (pen, width, height) => {
    pen.strokeStyle = hatch;
    for (let x = -height; x < width; x += 7) {
      pen.beginPath();
      pen.moveTo(x, height);
      pen.lineTo(x + height, 0);
      pen.stroke();
    }
  };
  const dotted = (pen, x, height) => {
    pen.fillStyle = faint;
    for (let y = 1; y < height; y += 4) pen.fillRect(x + GAP / 2 - 0.5, y, 1.5, 2);
  };

  // --- rows; on a time line their state changes

  const rows = data.rows;
  const count = rows ? rows.names.length : 0;
  const sizes = rows ? rows.sizes.slice() : [], present = rows ? rows.present.slice() : [];
  const cells = rows ? rows.cells.slice() : [];
  let parts = rows ? {...rows.parts} : {}, absent = new Set(rows ? rows.absent : []);
  const frames = data.frames || [];
  let shown = [], chosen = 0, cell = -1, step = 0;

  const missing = (row) => present[row] < 0 ? -1 : sizes[row] - present[row];
  const share = (row) => present[row] < 0 ? 2 : sizes[row] > 0 ? present[row] / sizes[row] : 1;
  const group = (row) => rows.groups[rows.group[row] || 0];
  const kindOf = (row) => rows.kinds[rows.kind[row] || 0];
  const start = (row) => rows.start[row] || 0;
  const byText = (first, second) => first < second ? -1 : first > second ? 1 : 0;
  const ORDERS = {
    missing: (a, b) => missing(b) - missing(a) || sizes[b] - sizes[a] || a - b,
    size: (a, b) => sizes[b] - sizes[a] || a - b,
    share: (a, b) => share(a) - share(b) || sizes[b] - sizes[a] || a - b,
    name: (a, b) => byText(rows.names[a], rows.names[b]) || start(a) - start(b),
    place: (a, b) => byText(group(a), group(b)) || start(a) - start(b) || byText(rows.names[a], rows.names[b]),
  };

  const choose = () => {
    const kept = shown[chosen];
    const find = element("find").value.toLowerCase(), kind = element("kind").value;
    shown = [];
    for (let row = 0; row < count; row += 1) {
      if (absent.has(row) || (kind !== "all" && kindOf(row) !== kind)) continue;
      if (find && !(rows.names[row].toLowerCase().includes(find) || group(row).toLowerCase().includes(find))) continue;
      shown.push(row);
    }
    const order = element("order").value;
    if (order !== "missing" || frames.length) shown.sort(ORDERS[order]);  // else they stand so
    chosen = Math.max(0, shown.indexOf(kept));
    element("space").style.height = shown.length * ROW + "px";
    element("none").hidden = shown.length > 0;
    element("list").hidden = shown.length === 0;
    element("has-unknown").hidden = !shown.some((row) => present[row] < 0);
    element("has-gap").hidden = !shown.some((row) => parts[row]);
    sum();
    draw();
    describe();
  };

  const sum = () => {
    let whole = 0, here = 0, unknown = 0;
    const all = element("kind").value === "all" && rows.kinds.length > 1;
    for (const row of shown) {
      if (all && kindOf(row) === "tensor") continue;  // a part of its file, which is a row too
      if (present[row] < 0) unknown += 1;
      else { whole += sizes[row]; here += present[row]; }
    }
    const tiles = [
      ["present", size(here), percent(here, whole)],
      ["missing", size(whole - here), ""],
      ["in all", size(whole), ""],
      ["rows", shown.length.toLocaleString("en"), ""],
    ];
    if (unknown) tiles.push(["cannot tell", unknown.toLocaleString("en"), unknown === 1 ? "row" : "rows"]);
    element("sums").replaceChildren(...tiles.map(([word, number, remark]) => {
      const tile = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = word;
      value.textContent = number;
      if (remark) value.appendChild(document.createElement("small")).textContent = remark;
      tile.append(term, value);
      return tile;
    }));
    element("whole-present").style.width = (whole > 0 ? 100 * here / whole : 100) + "%";
  };

  // --- a strip of cells

  const layout = (row, width) => {
    // The stretches of a row in pixels, with room for a mark where a gap is left out.
    const text = cells[row];
    const found = parts[row] || [[0, sizes[row], text.length]];
    const gaps = found.filter((part, index) => part[0] > (index ? found[index - 1][1] : 0)).length
      + (found[found.length - 1][1] < sizes[row] ? 1 : 0);
    const total = found.reduce((all, part) => all + part[2], 0), room = Math.max(1, width - gaps * GAP);
    const placed = [];
    let x = 0, end = 0, first = 0;
    for (const [start, stop, number] of found) {
      if (start > end) { placed.push({gap: start - end, x, width: GAP}); x += GAP; }
      placed.push({start, stop, first, number, x, width: room * number / total});
      x += room * number / total;
      first += number;
      end = stop;
    }
    if (end < sizes[row]) placed.push({gap: sizes[row] - end, x, width: GAP});
    return placed;
  };

  const prepared = (canvas, height) => {
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth || 300;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    return [pen, width];
  };

  const strip = (canvas, row, height) => {
    const [pen, width] = prepared(canvas, height);
    if (present[row] < 0) return hatched(pen, width, height);
    for (const part of layout(row, width)) {
      if (part.gap !== undefined) {
        dotted(pen, part.x, height);
        continue;
      }
      const wide = part.width / part.number;
      for (let at = 0; at < part.number;) {
        let end = at + 1;
        const letter = cells[row][part.first + at];
        while (end < part.number && cells[row][part.first + end] === letter) end += 1;
        pen.fillStyle = ramp[LEVEL.get(letter)];
        const left = Math.floor(part.x + at * wide), right = Math.ceil(part.x + end * wide);
        pen.fillRect(left, 0, right - left, height);
        at = end;
      }
    }
  };

  // --- the list: elements only for the rows in view

  const pool = [];
  const span = (parent, name) => {
    const made = document.createElement("span");
    made.className = name;
    parent.appendChild(made);
    return made;
  };
  const draw = () => {
    const list = element("list"), top = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const most = Math.min(shown.length - top, Math.ceil(list.clientHeight / ROW) + 8);
    while (pool.length < most) {
      const item = document.createElement("div");
      item.className = "row";
      item.setAttribute("role", "option");
      const name = span(item, "name");
      const entry = {item, name, dir: span(name, "dir"), base: span(name, "base"), canvas: document.createElement("canvas")};
      item.append(entry.canvas);
      entry.share = span(item, "");
      entry.sizes = span(item, "faint");
      item.addEventListener("click", () => { chosen = entry.at; cell = -1; draw(); describe(); });
      list.appendChild(item);
      pool.push(entry);
    }
    pool.forEach((entry, index) => {
      entry.item.hidden = index >= most;
      if (entry.item.hidden) return;
      const at = top + index, row = shown[at], name = rows.names[row], cut = name.lastIndexOf("/") + 1;
      entry.at = at;
      entry.item.id = "row-" + at;
      entry.item.style.transform = "translateY(" + at * ROW + "px)";
      entry.item.setAttribute("aria-selected", String(at === chosen));
      entry.item.setAttribute("aria-posinset", String(at + 1));
      entry.item.setAttribute("aria-setsize", String(shown.length));
      entry.item.setAttribute("aria-label", sentence(row));
      entry.dir.textContent = name.slice(0, cut);
      entry.base.textContent = name.slice(cut);
      entry.name.title = name + (kindOf(row) === "mapping" ? " at 0x" + start(row).toString(16) : "");
      entry.share.textContent = present[row] < 0 ? "?" : percent(present[row], sizes[row]);
      entry.sizes.textContent = size(sizes[row]);
      strip(entry.canvas, row, 16);
    });
    list.setAttribute("aria-activedescendant", "row-" + chosen);
    // Titles stand above their columns, whether or not the list has a scroll bar that takes room.
    element("head").style.borderRightWidth = list.offsetWidth - list.clientWidth - 1 + "px";
  };

  const sentence = (row) => {
    const owner = group(row) ? " in " + group(row) : "";
    if (present[row] < 0) return rows.names[row] + owner + ": cannot tell, " + rows.unknown[row];
    return rows.names[row] + owner + ": " + size(present[row]) + " of " + size(sizes[row]) + " present, "
      + percent(present[row], sizes[row]);
  };

  // --- the row at hand

  let big = [];
  const describe = () => {
    const row = shown[chosen], canvas = element("detail-map");
    element("detail").hidden = row === undefined;
    if (row === undefined) return;
    element("detail-name").textContent = rows.names[row];
    const owner = group(row) ? kindOf(row) + " of " + group(row) + ". " : "";
    const place = {file: "", tensor: " From byte " + start(row).toLocaleString("en") + " of the file on."}[kindOf(row)];
    element("detail-text").textContent = owner + (present[row] < 0
      ? "Cannot tell: " + rows.unknown[row] + "."
      : size(present[row]) + " of " + size(sizes[row]) + " present (" + percent(present[row], sizes[row]) + "), "
        + size(missing(row)) + " missing.") + (place ?? " From address 0x" + start(row).toString(16) + " on.");
    strip(canvas, row, 44);
    big = present[row] < 0 ? [] : layout(row, canvas.clientWidth || 300);
    showCell();
  };
  const showCell = () => {
    const row = shown[chosen], text = element("detail-cell");
    text.textContent = "";
    if (cell < 0 || present[row] < 0) return;
    const part = big.find((one) => one.gap === undefined && cell >= one.first && cell < one.first + one.number);
    if (!part) return;
    const bytes = (part.stop - part.start) / part.number, start = part.start + (cell - part.first) * bytes;
    const level = LEVEL.get(cells[row][cell]);
    text.textContent = "Cell " + (cell + 1) + " of " + cells[row].length + ": from " + size(Math.round(start)) + ", " + size(Math.round(bytes))
      + " long, " + (level === 0 ? "nothing" : level === TOP ? "all" : "about " + Math.round(100 * level / TOP) + " %") + " present.";
    const canvas = element("detail-map");
    strip(canvas, row, 44);
    const pen = canvas.getContext("2d"), wide = part.width / part.number;
    pen.strokeStyle = focus;
    pen.lineWidth = 2;
    pen.strokeRect(part.x + (cell - part.first) * wide, 1, Math.max(wide, 2), 42);
  };
  element("detail-map").addEventListener("mousemove", (event) => {
    const part = big.find((one) => one.gap === undefined && event.offsetX >= one.x && event.offsetX < one.x + one.width);
    cell = part ? part.first + Math.min(part.number - 1, Math.floor((event.offsetX - part.x) / part.width * part.number)) : -1;
    showCell();
  });

  element("list").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(element("list").clientHeight / ROW) - 1);
    const moves = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length};
    const turns = {ArrowRight: 1, ArrowLeft: -1};
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in moves) {
      chosen = Math.min(Math.max(chosen + moves[event.key], 0), shown.length - 1);
      cell = -1;
      const list = element("list"), top = chosen * ROW;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
      draw();
      describe();
    } else if (event.key in turns && shown.length) {
      cell = Math.min(Math.max(cell + turns[event.key], 0), cells[shown[chosen]].length - 1);
      showCell();
    } else return;
    event.preventDefault();
  });

  // --- the time line of a recording

  const seek = (wanted) => {
    if (wanted < step) {  // from the start: changes are kept forward only
      step = 0;
      for (let row = 0; row < count; row += 1) {
        sizes[row] = rows.sizes[row];
        present[row] = rows.present[row];
        cells[row] = rows.cells[row];
      }
      parts = {...rows.parts};
      absent = new Set(rows.absent);
    }
    while (step < wanted) {
      step += 1;
      for (const [row, length, here, text, stretches] of frames[step].rows) {
        sizes[row] = length;
        present[row] = here;
        cells[row] = text;
        parts[row] = stretches;
        absent.delete(row);
      }
      for (const row of frames[step].gone) absent.add(row);
    }
    element("time").value = step;
    element("at").textContent = frames[step].seconds.toFixed(1) + " s, frame " + (step + 1) + " of " + frames.length;
    choose();
  };
  let timer = 0;
  const play = (on) => {
    window.clearInterval(timer);
    timer = on ? window.setInterval(() => step + 1 < frames.length ? seek(step + 1) : play(false), 200) : 0;
    element("play").textContent = on ? "Pause" : "Play";
    element("play").setAttribute("aria-pressed", String(on));
  };

  // --- the grid of prefault bench

  const bench = (run) => {
    element("bench-machine").textContent = run.machine;
    for (const table of run.tables) {
      const made = document.createElement("table"), box = document.createElement("div");
      made.createCaption().textContent = table.title;
      const head = made.createTHead().insertRow();
      for (const word of ["", ...table.methods]) {
        const cellOfHead = document.createElement("th");
        cellOfHead.scope = "col";
        cellOfHead.textContent = word;
        head.append(cellOfHead);
      }
      const body = made.createTBody();
      for (const row of table.rows) {
        const written = body.insertRow(), name = document.createElement("th");
        name.scope = "row";
        name.textContent = row.name;
        written.append(name);
        for (const value of row.cells) {
          const box = written.insertCell();
          if (value === null || value.best === null) {
            box.className = "none";
            box.textContent = value === null ? "" : value.status;
            if (value !== null) box.title = value.reason;
            continue;
          }
          box.textContent = value.best;
          if (value.ratio !== null) {
            const note = document.createElement("small");
            note.textContent = value.ratio.toFixed(2) + (value.published === null ? "" : " (" + value.published.toFixed(2) + ")");
            box.append(note);
            const power = -Math.log2(value.ratio), strength = Math.min(1, Math.abs(power) / 4.5);
            box.style.backgroundColor = "hsl(var(" + (power > 0 ? "--fast" : "--slow") + ") / " + (0.62 * strength).toFixed(3) + ")";
          }
          if (value.doubts) box.title = value.doubts;
        }
      }
      box.className = "scroll";
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", table.title);
      box.append(made);
      element("bench-tables").append(box);
    }
    element("bench").hidden = false;
  };

  // --- start

  element("title").textContent = data.title;
  element("made").textContent = data.made;
  readColours();
  if (rows) {
    element("residency").hidden = false;
    const kinds = ["all", ...rows.kinds];
    for (const kind of rows.kinds.length > 1 ? kinds : ["all"]) {
      const option = document.createElement("option");
      option.value = kind;
      option.textContent = kind === "all" ? "all rows" : kind + "s";
      element("kind").append(option);
    }
    element("kind").value = rows.kinds.length > 1 ? data.first : "all";
    element("kind").parentElement.hidden = rows.kinds.length < 2;
    if (frames.length > 1) {
      element("timeline").hidden = false;
      element("time").max = frames.length - 1;
      element("time").addEventListener("input", () => { play(false); seek(Number(element("time").value)); });
      element("play").addEventListener("click", () => {
        if (timer) return play(false);
        if (step + 1 >= frames.length) seek(0);
        return play(true);
      });
      seek(0);
    } else choose();
    element("list").addEventListener("scroll", draw, {passive: true});
    for (const id of ["find", "kind", "order"]) element(id).addEventListener("input", () => { element("list").scrollTop = 0; choose(); });
    for (const id of ["tools", "timeline"]) element(id).addEventListener("submit", (event) => event.preventDefault());
  }
  if (data.bench) bench(data.bench);
  const again = () => { readColours(); if (rows) { draw(); describe(); } };
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  window.addEventListener("resize", again);
  document.documentElement.dataset.drawn = performance.now().toFixed(0);
})();
