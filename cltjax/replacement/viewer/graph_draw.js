"use strict";
// Where the items of a graph are, and how they are drawn: the lower canvas has what does not change under the pointer,
// the upper one what follows the focus. Reads `graph`, `state` and `view` of graph.js; fills the places in `view`.

const FAINT_LINKS = 200,
  DRAWN_LINKS = 500;
const colours = {}; // of the style sheet, in light or dark

// ---- where things are

/** Columns: positions that have nodes. Those of the image are narrow, and each run of them makes a band. */
function readColumns() {
  const cells = new Map(),
    columns = new Map();
  graph.nodes.forEach((node, i) => {
    if (graph.kind[i] === "logit") {
      if (!columns.has(node.ctx_idx)) columns.set(node.ctx_idx, 1);
      return;
    }
    const key = node.ctx_idx + ":" + graph.level[i];
    cells.set(key, [...(cells.get(key) || []), i]);
    columns.set(node.ctx_idx, Math.max(columns.get(node.ctx_idx) || 1, cells.get(key).length));
  });
  for (const cell of cells.values()) cell.sort((a, b) => (graph.nodes[b].share || 0) - (graph.nodes[a].share || 0));
  const sorted = [...columns]
    .sort((a, b) => a[0] - b[0])
    .map(([position, most]) => {
      const image = graph.patchNumber.has(position);
      return {
        position,
        image,
        part: image ? 0.2 * Math.sqrt(most) : Math.max(1, 0.75 * Math.sqrt(most)),
        most: image ? 20 : 180,
      };
    });
  return { cells, columns: sorted };
}

function layOut() {
  const box = at("graph"),
    { n, nodes, kind, level, nLayers } = graph;
  const wide = Math.max(280, box.clientWidth) * state.zoom,
    high = Math.max(300, box.clientHeight) * state.zoom;
  const left = 52,
    right = 14,
    below = 66,
    context = at("base").getContext("2d");
  const { cells, columns } = (view.grid ??= readColumns());
  // Share the width; columns that would be narrower than they may be take their least width first.
  let room = wide - left - right,
    parts = columns.reduce((sum, column) => sum + column.part, 0);
  // Of many patches each keeps a sliver: the whole graph fits, and zoom parts them.
  const sliver = Math.min(4, (0.36 * room) / columns.filter((column) => column.image).length);
  for (const column of columns) {
    column.width = 0;
    column.least = column.image ? sliver : 12;
  }
  for (let changed = true; changed;) {
    changed = false;
    for (const column of columns) {
      if (!column.width && (room / parts) * column.part < column.least) {
        column.width = column.least;
        room -= column.least;
        parts -= column.part;
        changed = true;
      }
    }
  }
  let x = left;
  for (const [number, column] of columns.entries()) {
    column.turn = number;
    column.width ||= Math.min(column.most * state.zoom, (room / parts) * column.part);
    column.x = x;
    x += column.width;
  }
  view.width = Math.max(wide, x + right);
  const byPosition = new Map(columns.map((column) => [column.position, column]));
  // Output labels: lines of a few, at the right end, above their position.
  context.font = font(12);
  const lines = [[]],
    used = [0];
  const logits = [...nodes.keys()]
    .filter((i) => kind[i] === "logit")
    .sort((a, b) => nodes[b].token_prob - nodes[a].token_prob);
  view.x = new Float64Array(n + state.groups.length);
  view.y = view.x.slice();
  view.halfWidth = view.x.slice();
  view.halfHeight = view.x.slice();
  view.text = [];
  for (const i of logits) {
    view.text[i] =
      short(logitToken(nodes[i]), 18) +
      (probabilityOf(nodes[i]) === null ? "" : " " + nodes[i].token_prob.toFixed(2).replace(/^0/, ""));
    const size = context.measureText(view.text[i]).width + 14;
    if (used.at(-1) + size > view.width - left - right) {
      lines.push([]);
      used.push(0);
    }
    lines.at(-1).push(i);
    used[used.length - 1] += size + 6;
    view.halfWidth[i] = size / 2;
    view.halfHeight[i] = 10;
  }
  const above = 12 + lines.length * 26;
  const rowHeight = Math.max(24, (high - above - below) / (nLayers + 1));
  view.height = Math.max(high, above + below + rowHeight * (nLayers + 1));
  view.row = (height) => (height > nLayers ? above / 2 : view.height - below - (height + 0.5) * rowHeight);
  view.rowHeight = rowHeight;
  view.left = left;
  view.below = below;
  view.columns = columns;
  lines.forEach((line, number) => {
    const column = byPosition.get(nodes[line[0]]?.ctx_idx);
    if (!column) return;
    let place = Math.max(
      left,
      Math.min(view.width - right - used[number], column.x + column.width / 2 - used[number] / 2),
    );
    for (const i of line) {
      view.x[i] = place + view.halfWidth[i];
      view.y[i] = 20 + number * 26;
      place += 2 * view.halfWidth[i] + 6;
    }
  });
  const top = nodes.reduce((most, node, i) => (kind[i] === "logit" ? most : Math.max(most, node.share || 0)), 1e-12);
  for (const cell of cells.values()) {
    const column = byPosition.get(nodes[cell[0]].ctx_idx),
      width = column.width * 0.94,
      height = rowHeight * 0.88;
    const across = Math.max(1, Math.min(cell.length, Math.round(Math.sqrt((cell.length * width) / height))));
    // Slivers lie so close that their nodes would cover each other: neighbours take turns in height.
    const sliver = column.image && column.width < 8 && level[cell[0]] > 0,
      down = sliver ? 7 : Math.ceil(cell.length / across);
    cell.forEach((i, number) => {
      const line = sliver ? (3 * (column.turn + number)) % down : Math.floor(number / across);
      view.x[i] =
        column.x + column.width / 2 + (sliver ? 0 : ((number % across) + 0.5 - across / 2) * (width / across));
      view.y[i] = view.row(level[i]) + (line + 0.5 - down / 2) * (height / down);
      const size = Math.min(
        2.4 + 8 * Math.sqrt((nodes[i].share || 0) / top),
        Math.max(3, 0.46 * Math.min(rowHeight, Math.max(column.width, 14))),
      );
      view.halfHeight[i] = kind[i] === "feature" ? size : size * (kind[i] === "error" ? 1.15 : 0.9);
      view.halfWidth[i] =
        kind[i] === "patch" ? Math.max(1, Math.min(size * 0.9, column.width / 2 - 0.4)) : view.halfHeight[i];
    });
  }
  state.groups.forEach((group, g) => {
    const shown = group.members.filter((member) => view.visible[member]),
      item = n + g;
    if (group.open || !shown.length) return;
    view.text[item] = `${short(group.name, 22)} · ${group.members.length}`;
    view.halfWidth[item] = (context.measureText(view.text[item]).width + 16) / 2;
    view.halfHeight[item] = 11;
    const mean = (values) => shown.reduce((sum, member) => sum + values[member], 0) / shown.length;
    view.x[item] = Math.max(
      left + view.halfWidth[item],
      Math.min(view.width - right - view.halfWidth[item], mean(view.x)),
    );
    view.y[item] = mean(view.y);
  });
  for (const name of ["base", "over"]) sizeCanvas(at(name));
  view.items.sort((a, b) => view.halfHeight[b] - view.halfHeight[a]); // small ones are drawn over large ones
  fillBuckets();
  view.rows = new Map();
  for (const item of view.items) {
    const row = rowOf(item);
    view.rows.set(row, [...(view.rows.get(row) || []), item]);
  }
  for (const row of view.rows.values()) row.sort((a, b) => view.x[a] - view.x[b] || view.y[a] - view.y[b]);
  drawBase();
  redraw();
}

const font = (size, weight = 400) =>
  `${weight} ${size}px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif`;
const rowOf = (item) =>
  Math.round(membersOf(item).reduce((sum, member) => sum + graph.level[member], 0) / membersOf(item).length);
/** The item that stands for this one on the canvas: a node in a closed supernode is drawn as that. */
const shownAs = (item) => (isGroup(item) ? item : view.drawnAs[item]);

function sizeCanvas(canvas) {
  const scale = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = Math.round(view.width * scale);
  canvas.height = Math.round(view.height * scale);
  canvas.style.width = view.width + "px";
  canvas.style.height = view.height + "px";
  canvas.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
}

/** A spatial hash: the pointer is compared with what is near it only. */
const BUCKET = 24;
function fillBuckets() {
  view.buckets = new Map();
  for (const item of view.items) {
    const [x, y, w, h] = [view.x[item], view.y[item], view.halfWidth[item] + 3, view.halfHeight[item] + 3];
    for (let i = Math.floor((x - w) / BUCKET); i <= (x + w) / BUCKET; i++) {
      for (let j = Math.floor((y - h) / BUCKET); j <= (y + h) / BUCKET; j++) {
        const key = i * 65536 + j;
        if (!view.buckets.has(key)) view.buckets.set(key, []);
        view.buckets.get(key).push(item);
      }
    }
  }
}

/** The item at a place on the canvas: supernodes before others, then that whose border, then whose centre is nearest. */
function itemAt(x, y) {
  let best = null,
    least = Infinity;
  for (const item of view.buckets.get(Math.floor(x / BUCKET) * 65536 + Math.floor(y / BUCKET)) || []) {
    const dx = Math.abs(x - view.x[item]),
      dy = Math.abs(y - view.y[item]);
    const outside = Math.max(0, dx - view.halfWidth[item], dy - view.halfHeight[item]);
    const distance = 8 * outside + Math.hypot(dx, dy) - (isGroup(item) ? 1000 : 0);
    if (outside <= 3 && distance < least) {
      least = distance;
      best = item;
    }
  }
  return best;
}

// ---- drawing

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of [
    "bg",
    "raised",
    "ink",
    "muted",
    "line",
    "band",
    "veil",
    "feature",
    "error",
    "word",
    "patch",
    "label",
    "positive",
    "negative",
    "found",
    "faint",
  ])
    colours[name] = style.getPropertyValue("--" + name).trim();
}

function trace(context, item, grow = 0) {
  const x = view.x[item],
    y = view.y[item],
    w = view.halfWidth[item] + grow,
    h = view.halfHeight[item] + grow;
  context.beginPath();
  if (view.text[item] !== undefined) context.roundRect(x - w, y - h, 2 * w, 2 * h, isGroup(item) ? 4 : h);
  else if (graph.kind[item] === "error") {
    context.moveTo(x, y - h);
    context.lineTo(x + w, y);
    context.lineTo(x, y + h);
    context.lineTo(x - w, y);
    context.closePath();
  } else if (graph.kind[item] === "feature") context.arc(x, y, h, 0, 2 * Math.PI);
  else context.rect(x - w, y - h, 2 * w, 2 * h);
}

/** An item, in its own colour or that of a sign (`tint`). */
function drawItem(context, item, tint = null) {
  const kind = graph.kind[item];
  trace(context, item);
  if (view.text[item] !== undefined) {
    context.fillStyle = colours.label;
    context.strokeStyle = tint || colours.muted;
    context.lineWidth = tint ? 2 : 1;
    context.fill();
    context.stroke();
    context.fillStyle = colours.ink;
    context.font = font(12, isGroup(item) || graph.nodes[item].is_target_logit ? 600 : 400);
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(view.text[item], view.x[item], view.y[item] + 0.5, 2 * view.halfWidth[item] - 8);
  } else if (kind === "error") {
    context.fillStyle = colours.bg;
    context.strokeStyle = tint || colours.error;
    context.lineWidth = 1.3;
    context.fill();
    context.stroke();
  } else {
    context.fillStyle = tint || colours[kind];
    context.fill();
    if (kind === "feature") {
      context.strokeStyle = colours.bg;
      context.lineWidth = 0.7;
      context.stroke();
    } // parts those that overlap
  }
}

function drawLink(context, source, target) {
  const x1 = view.x[source],
    y1 = view.y[source] - view.halfHeight[source],
    x2 = view.x[target],
    y2 = view.y[target] + view.halfHeight[target];
  const bend = Math.max(14, Math.abs(y1 - y2) * 0.42);
  context.beginPath();
  context.moveTo(x1, y1);
  context.bezierCurveTo(x1, y1 - bend, x2, y2 + bend, x2, y2);
  context.stroke();
}

/** What does not change under the pointer: axes, the strongest links faintly, all items. */
function drawBase() {
  const context = at("base").getContext("2d"),
    { nLayers } = graph;
  context.fillStyle = colours.bg;
  context.fillRect(0, 0, view.width, view.height);
  const floor = view.height - view.below,
    ceiling = view.row(nLayers) - view.rowHeight / 2;
  drawColumns(context, floor, ceiling);
  context.font = font(11);
  context.fillStyle = colours.muted;
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let height = 0; height <= nLayers + 1; height++) {
    context.fillText(
      height === 0 ? "embed" : height > nLayers ? "output" : "L" + (height - 1),
      view.left - 8,
      view.row(height),
    );
    const edge = height > nLayers ? ceiling : view.row(height) + view.rowHeight / 2;
    context.beginPath();
    context.moveTo(view.left, Math.round(edge) + 0.5);
    context.lineTo(view.width - 8, Math.round(edge) + 0.5);
    context.stroke();
  }
  context.strokeStyle = colours.faint;
  context.lineWidth = 1;
  let drawn = 0;
  for (const link of graph.strongest) {
    if (drawn >= FAINT_LINKS) break;
    const source = view.drawnAs[graph.from[link]],
      target = view.drawnAs[graph.to[link]];
    if (!view.live[link] || source === target) continue;
    drawLink(context, source, target);
    drawn++;
  }
  for (const item of view.items) if (view.text[item] === undefined) drawItem(context, item);
  for (const item of view.items) if (view.text[item] !== undefined) drawItem(context, item);
}

/** Bands behind the image's positions, and the words below the others. */
function drawColumns(context, floor, ceiling) {
  const columns = view.columns,
    slant = columns.some(
      (column) => !column.image && context.measureText(tokenAt(column.position)).width > column.width - 4,
    );
  for (let i = 0; i < columns.length; i++) {
    const column = columns[i];
    context.fillStyle = colours.muted;
    context.textBaseline = "middle";
    context.font = font(11);
    if (column.image) {
      let last = i;
      while (columns[last + 1]?.image) last++;
      const width = columns[last].x + columns[last].width - column.x;
      context.fillStyle = colours.band;
      context.fillRect(column.x, ceiling, width, floor - ceiling);
      context.fillStyle = colours.muted;
      context.textAlign = "center";
      const label = `image · ${last - i + 1} patches`;
      if (width > 30)
        context.fillText(context.measureText(label).width < width ? label : "image", column.x + width / 2, floor + 12);
      i = last;
      continue;
    }
    const text = short(tokenAt(column.position), slant ? 11 : 18);
    context.save();
    context.translate(column.x + column.width / 2 + (slant ? 3 : 0), floor + (slant ? 7 : 12));
    if (slant) context.rotate(-Math.PI / 3);
    context.textAlign = slant ? "right" : "center";
    context.fillText(text, 0, 0);
    context.restore();
  }
}

let asked = false;
/** Draw what follows the focus with the next frame, once. */
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const start = performance.now();
    drawFocus();
    at("graph").dataset.redraw = (performance.now() - start).toFixed(2);
  });
}

function focusNow() {
  if (state.hover) return state.hover;
  const items = pinnedItems();
  return items.length ? { item: items.at(-1), members: membersOf(items.at(-1)) } : null;
}
const pinnedItems = () => state.pinned.map(itemOf).filter((item) => item !== null);

/** The overlay: links, sources and targets of the focus, rings; and the patches of the image. */
function drawFocus() {
  const context = at("over").getContext("2d"),
    focus = focusNow(),
    pinned = pinnedItems();
  context.clearRect(0, 0, view.width, view.height);
  if (focus) {
    context.fillStyle = colours.veil;
    context.fillRect(view.left, 0, view.width, view.height - view.below); // not over the names of layers and positions
    // Beside a node that is only looked at, what is pinned keeps its links: two nodes can be compared.
    const others = pinned.filter((item) => item !== focus.item);
    for (const item of others) drawLinks(context, item, neighbours(graph, view, membersOf(item)), 0.35);
    const near = neighbours(graph, view, focus.members),
      ups = spread(graph, view, focus.members, true, state.through),
      downs = spread(graph, view, focus.members, false, state.through);
    drawLinks(context, focus.item, near, 1);
    const driven = drawSpread(context, [ups, downs]);
    at("graph").dataset.driven = driven
      .filter((item) => downs.strength[item])
      .slice(0, 30)
      .map(idOf)
      .join(" ");
    for (const item of [...others, focus.item]) drawItem(context, shownAs(item));
    labelNear(context, focus, near);
    lightPatches(focus, ups);
  } else {
    at("graph").dataset.driven = "";
    lightPatches(null, null);
  }
  ring(context, view.found.slice(0, 400), colours.found, 1.6);
  ring(context, pinned, colours.ink, 2);
  if (state.hover) ring(context, [state.hover.item], colours.ink, 2);
  at("graph").dataset.focus = focus ? idOf(focus.item) : "";
  at("graph").toggleAttribute("data-over", Boolean(state.hover));
  showTip();
}

function drawLinks(context, item, { ins, outs }, alpha) {
  const end = shownAs(item);
  for (const [side, links] of [
    [0, ins],
    [1, outs],
  ]) {
    const most = Math.abs(links[0]?.[1]) || 1;
    for (const [other, weight] of links.slice(0, DRAWN_LINKS).reverse()) {
      const part = Math.abs(weight) / most;
      context.strokeStyle = weight > 0 ? colours.positive : colours.negative;
      context.globalAlpha = alpha * (0.15 + 0.75 * Math.sqrt(part));
      context.lineWidth = 0.5 + 4 * part;
      drawLink(context, side ? end : other, side ? other : end);
    }
  }
  context.globalAlpha = 1;
}

/** Nodes that feed the focus or are driven by it, in the colour of the sign; returns them, strongest first. */
function drawSpread(context, spreads) {
  const found = [];
  for (const { strength, net } of spreads) {
    const most = strength.reduce((a, b) => Math.max(a, b), 0);
    strength.forEach((value, node) => {
      if (value > 0.01 * most && view.visible[node]) found.push([node, value / most, net[node]]);
    });
  }
  found.sort((a, b) => b[1] - a[1]);
  for (const [node, part, net] of found.toReversed()) {
    const item = view.drawnAs[node];
    context.globalAlpha = 0.3 + 0.7 * Math.sqrt(part);
    drawItem(context, item, net > 0 ? colours.positive : colours.negative);
  }
  context.globalAlpha = 1;
  return found.map(([node]) => node);
}

/** Names beside the strongest neighbours, where there is room. */
function labelNear(context, focus, { ins, outs }) {
  const taken = [box(shownAs(focus.item), 2)];
  context.font = font(11);
  context.textAlign = "left";
  context.textBaseline = "middle";
  for (const [item] of [...(state.hover ? [] : [[shownAs(focus.item)]]), ...outs.slice(0, 6), ...ins.slice(0, 8)]) {
    if (
      view.text[item] !== undefined ||
      graph.kind[item] === "error" ||
      graph.kind[item] === "patch" ||
      graph.kind[item] === "word"
    )
      continue;
    const text = short(nameOf(item), 26),
      width = context.measureText(text).width;
    const fits = view.x[item] + view.halfWidth[item] + 6 + width < view.width;
    const x = fits ? view.x[item] + view.halfWidth[item] + 6 : view.x[item] - view.halfWidth[item] - 6 - width,
      y = view.y[item];
    const own = [x, y - 7, x + width, y + 7];
    if (taken.some((other) => own[0] < other[2] && own[2] > other[0] && own[1] < other[3] && own[3] > other[1]))
      continue;
    taken.push(own);
    context.lineWidth = 3;
    context.strokeStyle = colours.bg;
    context.lineJoin = "round";
    context.strokeText(text, x, y);
    context.fillStyle = colours.ink;
    context.fillText(text, x, y);
  }
}

const box = (item, more) => [
  view.x[item] - view.halfWidth[item] - more,
  view.y[item] - view.halfHeight[item] - more,
  view.x[item] + view.halfWidth[item] + more,
  view.y[item] + view.halfHeight[item] + more,
];

function ring(context, items, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  for (const item of new Set(items.map(shownAs))) {
    if (!isGroup(item) && !view.visible[item]) continue;
    trace(context, item, 2.5);
    context.stroke();
  }
}

function showTip() {
  const tip = at("tip"),
    hover = state.hover;
  tip.hidden = !hover || (!isGroup(hover.item) && !view.visible[hover.item]) || Boolean(hover.onImage);
  if (tip.hidden) return;
  const item = shownAs(hover.item),
    frame = at("graph");
  tip.replaceChildren(
    make("b", {}, short(nameOf(hover.item), 120)),
    placeOf(hover.item),
    make("br"),
    figuresOf(hover.item)
      .map((fact) => fact.join(" "))
      .join(" · "),
  );
  const left = view.x[item] + view.halfWidth[item] + 12,
    top = view.y[item] + 12;
  const past = left + tip.offsetWidth > frame.scrollLeft + frame.clientWidth,
    low = top + tip.offsetHeight > frame.scrollTop + frame.clientHeight;
  tip.style.left =
    Math.max(frame.scrollLeft + 2, past ? view.x[item] - view.halfWidth[item] - 12 - tip.offsetWidth : left) + "px";
  tip.style.top = Math.max(frame.scrollTop + 2, low ? view.y[item] - 12 - tip.offsetHeight : top) + "px";
}
