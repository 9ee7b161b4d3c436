"use strict";
// The page of one attribution graph (graph.json, see graph_json.py): its state, what follows from it, the image as SVG,
// lists as DOM, pointer and keyboard, links. graph_model.js has the sums over links, graph_draw.js the two canvases.
//
// Words used here: a *node* is an index into data.nodes. A *supernode* is a named group of nodes. An *item* is what is
// drawn: a node, or (from graph.n on) a supernode that is closed. A *focus* is what the pointer or the keyboard is on,
// else what was pinned last: {item, members}, members being nodes. All figures come from links between nodes; items
// only say where they are drawn. Texts come from data sets: they are shown by textContent and append, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = { feature: "features", error: "errors", word: "words", patch: "patches" }; // logits are always shown
const SCORES = {
  replacement: ["Replacement", "share of the influence on the answer that starts at words and patches, not at errors"],
  completeness: ["Completeness", "share of the nodes' inputs that are not errors, weighted by influence"],
};
const LISTED = 20,
  LISTED_NODES = 60;
const SUPERNODE = "supernode:";
const TOKEN_LABEL = /^Output "(.*)" \(p=[\d.e+-]+\)$/s;

const at = (id) => document.getElementById(id);
const graph = readGraph(data);
const state = {
  hover: null,
  pinned: [],
  nodes: 1,
  links: 1,
  hidden: new Set(),
  through: false,
  query: "",
  groups: [],
  zoom: 1,
};
const view = {}; // what follows from state: filled by rebuild(), and by layOut() of graph_draw.js

// ---- small helpers

/** An element with attributes, listeners ("onclick") and children; a child that is a string becomes text. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function figure(value) {
  if (value === null || value === undefined) return "";
  const text =
    Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-4)
      ? value.toExponential(1)
      : String(Number(value.toPrecision(3)));
  return text.replace("-", "−");
}
const signed = (value) => (value > 0 ? "+" : "") + figure(value);
const percent = (share) =>
  (share >= 0.0995 ? Math.round(share * 100) : Number((share * 100).toPrecision(2))) + "\u00a0%";
const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const visibleToken = (token) =>
  token
    .replaceAll("\n", "⏎")
    .replace(/^[ ▁]+(?=.)/, "")
    .replace(/^[ ▁]$/, "␣") || "␣";

// ---- names and descriptions

const tokenAt = (position) => visibleToken(graph.positions[position]?.token ?? "?");
const isGroup = (item) => item >= graph.n;
const groupOf = (item) => state.groups[item - graph.n];
const membersOf = (item) => (isGroup(item) ? groupOf(item).members : [item]);
const idOf = (item) => (isGroup(item) ? SUPERNODE + groupOf(item).name : graph.nodes[item].node_id);

function itemOf(id) {
  if (graph.index.has(id)) return graph.index.get(id);
  const found = state.groups.findIndex((group) => SUPERNODE + group.name === id);
  return found < 0 ? null : graph.n + found;
}

/** "3:17" as it is known from the panel, else from circuit-tracer's number. */
const featureKey = (node) => node.panel || unpair(node.feature).join(":");

function nameOf(item) {
  if (isGroup(item)) return groupOf(item).name;
  const node = graph.nodes[item];
  switch (graph.kind[item]) {
    case "logit":
      return logitToken(node);
    case "error":
      return `error, layer ${node.layer}`;
    case "word":
      return tokenAt(node.ctx_idx);
    case "patch":
      return node.members > 1 ? `${node.members} patches` : `patch ${graph.patchNumber.get(node.ctx_idx)}`;
    default:
      return node.clerp || data.features?.[node.panel]?.label || `feature ${featureKey(node)}`;
  }
}

/** circuit-tracer writes `Output "token" (p=0.9)` where a label is expected; of other targets ours says `Output name`. */
function logitToken(node) {
  const found = TOKEN_LABEL.exec(node.clerp) || /^Output (.+)$/s.exec(node.clerp);
  return visibleToken(found ? found[1] : node.clerp || node.node_id);
}

/** Of a target that is no token (a contrast of two) token_prob is a weight. */
const probabilityOf = (node) => (TOKEN_LABEL.test(node.clerp) && node.token_prob > 0 ? node.token_prob : null);

/** Where an item is, in words. */
function placeOf(item) {
  if (isGroup(item)) return `supernode of ${groupOf(item).members.length}`;
  const node = graph.nodes[item],
    kind = graph.kind[item];
  if (kind === "logit") return probabilityOf(node) === null ? "output" : `output, p = ${figure(node.token_prob)}`;
  const where =
    kind === "patch"
      ? ""
      : graph.patchNumber.has(node.ctx_idx)
        ? `patch ${graph.patchNumber.get(node.ctx_idx)}, `
        : `“${short(tokenAt(node.ctx_idx), 24)}”, `;
  if (kind === "feature") return `feature ${featureKey(node)} at ${where}position ${node.ctx_idx}`;
  return `${kind === "error" ? "left over by the transcoder at" : kind + " at"} ${kind === "word" ? "" : where}position ${node.ctx_idx}`;
}

function figuresOf(item) {
  const nodes = membersOf(item).map((member) => graph.nodes[member]);
  const share = nodes.reduce((sum, node) => sum + (node.share || 0), 0);
  const facts = [
    [
      "influence",
      percent(share) +
        (nodes.length === 1 && nodes[0].influence != null ? `, cumulative ${figure(nodes[0].influence)}` : ""),
    ],
  ];
  if (nodes.length === 1 && nodes[0].activation != null) facts.unshift(["activation", figure(nodes[0].activation)]);
  return facts;
}

const describe = (item) => [nameOf(item), placeOf(item), ...figuresOf(item).map((fact) => fact.join(" "))].join("; ");

// ---- what is shown

/** Everything that follows from thresholds, kinds and supernodes. */
function rebuild() {
  const { n, nodes, kind, from, to, weight, before } = graph;
  view.visible = nodes.map((node, i) => {
    const stays =
      kind[i] === "word" ||
      kind[i] === "patch" ||
      node.influence == null ||
      !(node.influence > state.nodes) ||
      state.nodes === 1;
    return kind[i] === "logit" || (stays && !state.hidden.has(kind[i]));
  });
  view.drawnAs = Int32Array.from(nodes.keys());
  state.groups.forEach((group, g) => {
    if (!group.open) for (const member of group.members) view.drawnAs[member] = n + g;
  });
  view.live = new Uint8Array(from.length);
  view.inflow = new Float64Array(n); // sum of |weight| of a node's inputs
  view.liveLinks = 0;
  for (let link = 0; link < from.length; link++) {
    if (!view.visible[from[link]] || !view.visible[to[link]] || (state.links < 1 && before[link] >= state.links))
      continue;
    view.live[link] = 1;
    view.liveLinks++;
    view.inflow[to[link]] += Math.abs(weight[link]);
  }
  // what a node gets from links that are not in the file, or hidden, is not shared out among those that are
  nodes.forEach((node, i) => (view.inflow[i] = Math.max(view.inflow[i], node.inputs ?? 0)));
  view.items = [...new Set([...nodes.keys()].filter((i) => view.visible[i]).map((i) => view.drawnAs[i]))];
  view.found = state.query ? view.items.filter(matches) : [];
  layOut();
  renderSide();
  keepInLink();
}

function matches(item) {
  const query = state.query.toLowerCase();
  return [item, ...membersOf(item)].some((one) => {
    const node = graph.nodes[one];
    const texts = node
      ? [
          node.node_id,
          node.clerp || "",
          nameOf(one),
          graph.positions[node.ctx_idx]?.token ?? "",
          data.features?.[node.panel]?.label || "",
        ]
      : [nameOf(one)];
    return texts.some((text) => text.toLowerCase().includes(query));
  });
}

// ---- the image

const isData = (source) => typeof source === "string" && source.startsWith("data:image/");

function buildImage() {
  const drawing = at("patches"),
    image = data.image,
    [width, height] = image ? [image.width, image.height] : [1, 1];
  const rects = graph.positions.map((position, i) => ({ rect: position.rect, i })).filter(({ rect }) => rect);
  document.body.classList.toggle("imageless", !image && !rects.length);
  at("stack").style.aspectRatio = `${width} / ${height}`;
  at("image").hidden = !isData(image?.src);
  if (isData(image?.src)) at("image").src = image.src;
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  // Where patches lie over each other (crops of a larger image), the small ones can be pointed at.
  rects.sort((a, b) => b.rect[2] * b.rect[3] - a.rect[2] * a.rect[3]);
  view.rects = new Map();
  for (const { rect, i } of rects) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const [x, y, w, h] = [rect[0] * width, rect[1] * height, rect[2] * width, rect[3] * height];
    for (const [name, value] of Object.entries({ x, y, width: w, height: h, "data-position": i }))
      made.setAttribute(name, value);
    if (!graph.patches.has(i)) made.setAttribute("class", "mute");
    drawing.append(made);
    view.rects.set(i, made);
  }
}

/** Light the patches that feed the focus, and mark the focus and the pinned ones. */
function lightPatches(focus, ups) {
  const heat = focus && focus.members.map((member) => data.pixels?.[graph.nodes[member].node_id]).find(isData);
  at("heat").hidden = !heat;
  if (heat) at("heat").src = heat;
  const pinned = new Set(pinnedItems()),
    own = new Set(focus?.members),
    lights = [];
  for (const [position, nodes] of graph.patches) {
    const sum = (values) => nodes.reduce((total, node) => total + values[node], 0);
    if (ups && sum(ups.strength) > 0) lights.push([position, sum(ups.strength), sum(ups.net)]);
    mark(
      view.rects.get(position),
      {
        focus: nodes.some((node) => own.has(node)),
        pinned: nodes.some((node) => pinned.has(node)),
        lit: null,
        sign: null,
      },
      0,
    );
  }
  lights.sort((a, b) => b[1] - a[1]);
  for (const [position, strength, net] of lights) {
    const part = strength / lights[0][1];
    if (part >= 0.01)
      mark(view.rects.get(position), { lit: part.toFixed(2), sign: net > 0 ? "+" : "-" }, part);
  }
  at("lit").replaceChildren(...sayLit(focus, lights));
}

/** How strongly a patch is lit shows more by its outline than by a veil, which would change the picture's colors. */
function mark(rect, flags, part) {
  if (!rect) return;
  for (const [name, value] of Object.entries(flags)) {
    if (value === null || value === false) delete rect.dataset[name];
    else rect.dataset[name] = value === true ? "" : value;
  }
  rect.style.fillOpacity = part && 0.05 + 0.25 * part;
  rect.style.strokeWidth = part ? 1 + 3 * part : "";
}

/** The sentence under the image. */
function sayLit(focus, lights) {
  if (!focus) return ["Point at a node to see the patches that feed it, or at a patch to see what it drives."];
  const name = make("b", {}, short(nameOf(focus.item), 60)),
    way = state.through ? "through every path" : "by single links";
  if (graph.kind[focus.members[0]] === "patch") {
    const { strength, net } = spread(graph, view, focus.members, false, state.through);
    const driven = [...strength.keys()].filter((node) => strength[node] > 0).sort((a, b) => strength[b] - strength[a]);
    if (!driven.length) return [name, ` drives nothing that is shown, ${way}.`];
    const value = state.through ? percent(strength[driven[0]]) + " of its input" : signed(net[driven[0]]);
    return [
      name,
      ` drives ${driven.length} node${driven.length > 1 ? "s" : ""} ${way}; most: `,
      short(nameOf(driven[0]), 50),
      ` (${value}).`,
    ];
  }
  if (graph.kind[focus.members[0]] === "word") return [name, " is a word: no patch feeds it."];
  if (!lights.length) return ["No patch feeds ", name, ` ${way}.`];
  const most = lights[0],
    value = state.through ? percent(most[1]) : signed(most[2]);
  return [
    name,
    ` is fed by ${lights.length} patch${lights.length > 1 ? "es" : ""} ${way}; most: patch ${graph.patchNumber.get(most[0])} (${value}).`,
  ];
}

// ---- the lists beside the graph

/** A row that can be pointed at, focused and pinned; the bar is `part` of the width. */
function itemRow(item, value, part, sign) {
  const bar = make("span", { class: "bar", "data-sign": sign });
  bar.style.width = Math.max(1, 100 * part) + "%";
  const away = () => setHover(null);
  return make(
    "li",
    {},
    make(
      "button",
      {
        type: "button",
        "data-id": idOf(item),
        title: describe(item),
        "data-pinned": state.pinned.includes(idOf(item)),
        onclick: (event) => {
          state.hover = null;
          pin(item, event.shiftKey || event.ctrlKey || event.metaKey);
        },
        onmouseenter: () => setHover(item),
        onmouseleave: away,
        onfocus: () => setHover(item),
        onblur: away,
      },
      make("span", { class: "name" }, rowName(item)),
      make("span", {}, value),
      bar,
    ),
  );
}

function rowName(item) {
  if (isGroup(item) || graph.kind[item] === "logit" || graph.kind[item] === "patch") return nameOf(item);
  const node = graph.nodes[item],
    where = graph.patchNumber.has(node.ctx_idx)
      ? `patch ${graph.patchNumber.get(node.ctx_idx)}`
      : tokenAt(node.ctx_idx);
  if (graph.kind[item] === "word") return `word ${node.ctx_idx}: ${nameOf(item)}`;
  return `${nameOf(item)} · ${graph.kind[item] === "error" ? "" : "L" + node.layer + " "}at ${short(where, 16)}`;
}

function linkList(id, title, links, limit = LISTED) {
  const most = Math.abs(links[0]?.[1]) || 1;
  const rows = links
    .slice(0, limit)
    .map(([item, weight]) => itemRow(item, signed(weight), Math.abs(weight) / most, weight > 0 ? "+" : "-"));
  const found = make(
    "div",
    { id },
    make("h3", {}, `${title} (${links.length})`),
    make("ul", { class: "rows" }, ...rows),
  );
  if (links.length > limit)
    found.append(
      make(
        "button",
        { type: "button", onclick: () => found.replaceWith(linkList(id, title, links, limit + 200)) },
        "More",
      ),
    );
  return links.length ? found : make("div", { id }, make("h3", {}, `${title}: none shown`));
}

function renderSide() {
  // A row that has the keyboard keeps it when the lists are made again.
  const holder = document.activeElement?.closest?.("#side section"),
    id = document.activeElement?.dataset?.id;
  renderDetail();
  renderGroups();
  renderList();
  if (holder && id && !document.activeElement?.dataset?.id)
    [...holder.querySelectorAll("button[data-id]")]
      .find((button) => button.dataset.id === id)
      ?.focus({ preventScroll: true });
  const groups = state.groups.filter((group) => !group.open).length;
  at("count").textContent =
    `${view.visible.filter(Boolean).length} of ${graph.n} nodes, ${view.liveLinks} of ${graph.weight.length} links` +
    (groups ? `, ${groups} supernode${groups > 1 ? "s" : ""}` : "");
  at("graph").dataset.shown = view.visible.filter(Boolean).length;
  at("graph").dataset.links = view.liveLinks;
}

function renderDetail() {
  const items = pinnedItems(),
    item = items.at(-1),
    place = at("detail");
  at("graph").dataset.pinned = items.map(idOf).join(" ");
  if (item === undefined) {
    place.replaceChildren(
      make("h2", {}, "Nothing pinned"),
      make("p", { class: "muted" }, "Click a node to read its inputs and outputs."),
    );
    return;
  }
  const { ins, outs } = neighbours(graph, view, membersOf(item)),
    facts = [...figuresOf(item)];
  if (isGroup(item) || graph.kind[item] === "feature" || graph.kind[item] === "logit") {
    const { patch, word, error } = origins(graph, view, membersOf(item));
    facts.push(["comes from", `image ${percent(patch)}, words ${percent(word)}, errors ${percent(error)}`]);
  }
  if (!isGroup(item) && !view.visible[item]) facts.push(["hidden", "by a threshold or a filter"]);
  if (!isGroup(item)) facts.push(["id", graph.nodes[item].node_id]);
  place.replaceChildren(
    make("h2", {}, nameOf(item)),
    make("p", { class: "muted" }, placeOf(item)),
    make("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    linkList("inputs", "Inputs", ins),
    linkList("outputs", "Outputs", outs),
  );
  if (isGroup(item))
    place.append(
      make("h3", {}, "Members"),
      make(
        "ul",
        { class: "rows" },
        ...groupOf(item).members.map((member) => itemRow(member, percent(graph.nodes[member].share || 0), 0, null)),
      ),
    );
  const key = isGroup(item) ? undefined : graph.nodes[item].panel;
  if (data.features?.[key]) place.append(panelOf(key));
}

/** The panel of a feature, made once while it is shown: a slider that moves leaves it as it is. */
function panelOf(key) {
  if (view.panel?.key === key) return view.panel.holder;
  const nodes = new Map(); // by panel, the one with the most influence
  graph.nodes.forEach((node, i) => {
    if (node.panel && !(shareOf(nodes.get(node.panel) ?? i) > shareOf(i))) nodes.set(node.panel, i);
  });
  const holder = make("div", { id: "panel" });
  const near = { has: (other) => nodes.has(other), choose: (other) => pin(nodes.get(other)) };
  renderPanel(holder, data.features[key], data.images || {}, near);
  view.panel = { key, holder };
  return holder;
}

function renderGroups() {
  const place = at("groups"),
    candidates = pinnedItems().filter((item) => !isGroup(item) && graph.kind[item] !== "logit");
  place.hidden = !state.groups.length && candidates.length < 2;
  place.replaceChildren(make("h2", {}, "Supernodes"));
  if (candidates.length > 1) {
    const name = make("input", {
      "aria-label": "Name of the supernode",
      placeholder: `Name for these ${candidates.length} nodes`,
      maxlength: 80,
    });
    place.append(
      make(
        "form",
        {
          class: "inline",
          onsubmit: (event) => {
            event.preventDefault();
            group(name.value.trim() || "supernode", candidates);
          },
        },
        name,
        make("button", {}, "Group"),
      ),
    );
  }
  state.groups.forEach((one, g) =>
    place.append(
      make(
        "div",
        { class: "inline", "data-group": one.name },
        make("span", { class: "name" }, `${one.name} (${one.members.length})`),
        make(
          "button",
          {
            type: "button",
            "aria-pressed": String(one.open),
            onclick: () => {
              one.open = !one.open;
              rebuild();
            },
          },
          one.open ? "Close" : "Open",
        ),
        make(
          "button",
          {
            type: "button",
            onclick: () => {
              state.groups.splice(g, 1);
              rebuild();
            },
          },
          "Ungroup",
        ),
      ),
    ),
  );
}

function renderList() {
  const items = state.query ? view.found : view.items,
    share = (item) => membersOf(item).reduce((sum, member) => sum + (graph.nodes[member].share || 0), 0);
  const shares = new Map(items.map((item) => [item, share(item)])),
    sorted = [...items].sort((a, b) => shares.get(b) - shares.get(a)).slice(0, LISTED_NODES);
  const most = shares.get(sorted[0]) || 1,
    title = state.query ? `Found: ${items.length}` : "Nodes by influence";
  at("list").replaceChildren(
    make("h2", {}, title),
    make(
      "ul",
      { class: "rows" },
      ...sorted.map((item) => itemRow(item, percent(shares.get(item)), shares.get(item) / most, null)),
    ),
  );
  if (items.length > sorted.length)
    at("list").append(make("p", { class: "muted" }, `the first ${sorted.length} of ${items.length}`));
}

// ---- what people do

function setHover(item, options = {}) {
  if (item === (state.hover?.item ?? null)) return;
  state.hover = item === null ? null : { item, members: membersOf(item), ...options };
  if (item !== null) at("live").textContent = describe(item);
  redraw();
}

function pin(item, more = false) {
  const id = idOf(item);
  state.pinned = !more
    ? [id]
    : state.pinned.includes(id)
      ? state.pinned.filter((other) => other !== id)
      : [...state.pinned, id];
  at("live").textContent = (state.pinned.includes(id) ? "Pinned " : "Unpinned ") + describe(item);
  at("side").scrollTop = 0;
  renderSide();
  keepInLink();
  redraw();
}

function clear() {
  state.hover = null;
  state.pinned = [];
  at("live").textContent = "Cleared";
  renderSide();
  keepInLink();
  redraw();
}

/** Make nodes one supernode, out of any other they were in. */
function group(name, members) {
  const taken = new Set(members),
    names = new Set(state.groups.map((one) => one.name));
  for (const one of state.groups) one.members = one.members.filter((member) => !taken.has(member));
  state.groups = state.groups.filter((one) => one.members.length);
  let free = name;
  for (let i = 2; names.has(free); i++) free = `${name} ${i}`;
  state.groups.push({ name: free, members, open: false });
  state.pinned = [SUPERNODE + free];
  state.hover = null;
  rebuild();
}

/** Arrows: along a layer, or to the nearest node of the next layer that has any. */
function walk(key) {
  const focus = focusNow(),
    levels = [...view.rows.keys()].sort((a, b) => a - b);
  if (!levels.length) return;
  let next;
  const start = focus && shownAs(focus.item);
  if (start === null || !view.items.includes(start)) next = view.rows.get(levels.at(-1))[0];
  else if (key === "ArrowLeft" || key === "ArrowRight") {
    const row = view.rows.get(rowOf(start));
    next = row[row.indexOf(start) + (key === "ArrowRight" ? 1 : -1)];
  } else {
    const row = view.rows.get(levels[levels.indexOf(rowOf(start)) + (key === "ArrowUp" ? 1 : -1)]);
    next = row?.reduce((best, item) =>
      Math.abs(view.x[item] - view.x[start]) < Math.abs(view.x[best] - view.x[start]) ? item : best,
    );
  }
  if (next === undefined) return;
  setHover(next);
  scrollTo(next);
}

function scrollTo(item) {
  const frame = at("graph"),
    [x, y] = [view.x[item], view.y[item]],
    edge = 40;
  const left = Math.min(Math.max(frame.scrollLeft, x + edge - frame.clientWidth), x - edge),
    top = Math.min(Math.max(frame.scrollTop, y + edge - frame.clientHeight), y - edge);
  frame.scrollTo(left, top);
}

/** Arrows on the image: to the nearest patch in that direction. */
function walkPatches(key) {
  const centre = (position) => {
    const [x, y, w, h] = graph.positions[position].rect;
    return [x + w / 2, y + h / 2];
  };
  const places = [...graph.patches.keys()].filter((position) => view.rects.has(position));
  if (!places.length) return;
  const now = state.hover?.onImage ? graph.nodes[state.hover.members[0]].ctx_idx : null;
  if (now === null) {
    hoverPatch(places[0]);
    return;
  }
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key],
    [x, y] = centre(now);
  let best = null,
    least = Infinity;
  for (const position of places) {
    const [px, py] = centre(position),
      ahead = (px - x) * dx + (py - y) * dy,
      aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (ahead > 1e-6 && ahead + 3 * aside < least) {
      least = ahead + 3 * aside;
      best = position;
    }
  }
  if (best !== null) hoverPatch(best);
}

function hoverPatch(position) {
  const members = graph.patches.get(position);
  setHover(members ? members[0] : null, { members, onImage: true });
}

function followGraph() {
  const frame = at("graph");
  const under = (event) => {
    const place = at("over").getBoundingClientRect();
    return itemAt(event.clientX - place.left, event.clientY - place.top);
  };
  let last = "";
  frame.addEventListener("pointermove", (event) => {
    const place = event.clientX + " " + event.clientY;
    if (place !== last) setHover(under(event)); // what scrolls below a pointer at rest does not take the keyboard's focus
    last = place;
  });
  frame.addEventListener("pointerleave", () => {
    last = "";
    setHover(null);
  });
  frame.addEventListener("click", (event) => {
    const item = under(event);
    if (item !== null) pin(item, event.shiftKey || event.ctrlKey || event.metaKey);
  });
  frame.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow") && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      walk(event.key);
    }
    if (event.key === "Enter" && state.hover) pin(state.hover.item, event.shiftKey);
  });
  frame.addEventListener("blur", () => setHover(null));
  const drawing = at("patches");
  drawing.addEventListener("pointerover", (event) => {
    if (event.target.dataset.position) hoverPatch(Number(event.target.dataset.position));
  });
  drawing.addEventListener("pointerleave", () => setHover(null));
  drawing.addEventListener("blur", () => setHover(null));
  drawing.addEventListener("click", (event) => {
    const members = graph.patches.get(Number(event.target.dataset.position));
    if (members) pin(members[0], event.shiftKey || event.ctrlKey || event.metaKey);
  });
  drawing.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow")) {
      event.preventDefault();
      walkPatches(event.key);
    }
    if (event.key === "Enter" && state.hover) pin(state.hover.item, event.shiftKey);
  });
}

function followControls() {
  for (const name of ["nodes", "links"])
    at(name).addEventListener("input", () => {
      state[name] = Number(at(name).value);
      showControls();
      rebuild();
    });
  for (const [kind, label] of Object.entries(KINDS)) {
    if (!graph.kind.includes(kind)) continue;
    at("kinds").append(
      make(
        "label",
        {},
        make("input", {
          type: "checkbox",
          name: kind,
          onchange: (event) => {
            state.hidden[event.target.checked ? "delete" : "add"](kind);
            rebuild();
          },
        }),
        label,
      ),
    );
  }
  at("paths").addEventListener("change", (event) => {
    state.through = event.target.value === "through";
    keepInLink();
    redraw();
  });
  at("search").addEventListener("input", () => {
    state.query = at("search").value.trim();
    state.hover = null;
    rebuild();
  });
  at("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    if (view.found.length) {
      pin(view.found.reduce((a, b) => (shareOf(b) > shareOf(a) ? b : a)));
    }
  });
  at("closer").addEventListener("click", () => zoom(1.5));
  at("farther").addEventListener("click", () => zoom(1 / 1.5));
  at("ask").addEventListener("click", () => at("help").showModal());
  at("copy").addEventListener("click", exportJson);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      clear();
      return;
    }
    if (event.target.matches("input:not([type=range], [type=checkbox], [type=radio]), textarea")) return;
    if (event.key === "/") {
      event.preventDefault();
      at("search").focus();
    }
    if (event.key === "?") at("help").showModal();
    if (event.key === "+") zoom(1.5);
    if (event.key === "-") zoom(1 / 1.5);
  });
}
const shareOf = (item) => membersOf(item).reduce((sum, member) => sum + (graph.nodes[member].share || 0), 0);

function zoom(factor) {
  const focus = focusNow();
  state.zoom = Math.min(3.375, Math.max(1, state.zoom * factor));
  layOut();
  keepInLink();
  if (focus) scrollTo(shownAs(focus.item));
}

function showControls() {
  for (const name of ["nodes", "links"]) {
    at(name).value = state[name];
    at(name + "-value").textContent = state[name].toFixed(2);
  }
  for (const input of at("kinds").querySelectorAll("input")) input.checked = !state.hidden.has(input.name);
  for (const input of at("paths").querySelectorAll("input"))
    input.checked = (input.value === "through") === state.through;
  at("search").value = state.query;
}

// ---- state in files and links

const idsOf = (members) => members.map((member) => graph.nodes[member].node_id);
const writtenGroups = () => state.groups.map((one) => [one.name, ...idsOf(one.members)]);

/** Supernodes from [[name, id, ...], ...]; a node that is not in the graph, or in an earlier one, is left out. */
function readGroups(written) {
  const taken = new Set(),
    names = new Set(),
    groups = [];
  for (const [name, ...ids] of written || []) {
    const members = ids
      .map((id) => graph.index.get(id))
      .filter((i) => i !== undefined && graph.kind[i] !== "logit" && !taken.has(i));
    members.forEach((member) => taken.add(member));
    let free = String(name);
    for (let i = 2; names.has(free); i++) free = `${name} ${i}`;
    names.add(free);
    if (members.length) groups.push({ name: free, members, open: false });
  }
  return groups;
}

/** qParams as circuit-tracer's front end reads them: members of supernodes are pinned there. */
function qParams() {
  const nodes = pinnedItems().flatMap(membersOf),
    grouped = state.groups.flatMap((one) => one.members);
  const clicked = pinnedItems()
    .filter((item) => !isGroup(item))
    .at(-1);
  return {
    ...data.qParams,
    pinnedIds: [...new Set(idsOf([...nodes, ...grouped]))],
    supernodes: writtenGroups(),
    clickedId: clicked === undefined ? "" : graph.nodes[clicked].node_id,
  };
}

async function exportJson() {
  at("json").value = JSON.stringify(qParams(), null, 2);
  at("copied").textContent = "";
  at("export").showModal();
  at("json").select();
  try {
    await navigator.clipboard.writeText(at("json").value);
    at("copied").textContent = "Copied to the clipboard.";
  } catch {
    // not allowed here: the text is selected
    at("copied").textContent = "Copy the selected text.";
  }
}

let keeping = 0;
/** Mirror the state in the address, so that a link keeps it; not at every step of a slider. */
function keepInLink() {
  clearTimeout(keeping);
  keeping = setTimeout(() => {
    const kept = new URLSearchParams();
    if (state.nodes < 1) kept.set("nodes", state.nodes);
    if (state.links < 1) kept.set("links", state.links);
    if (state.through) kept.set("through", 1);
    if (state.zoom > 1) kept.set("zoom", Number(state.zoom.toFixed(3)));
    if (state.query) kept.set("search", state.query);
    for (const kind of state.hidden) kept.append("hide", kind);
    for (const id of state.pinned) kept.append("pin", id);
    if (JSON.stringify(writtenGroups()) !== JSON.stringify(view.givenGroups))
      kept.set("supernodes", JSON.stringify(writtenGroups()));
    for (const one of state.groups) if (one.open) kept.append("open", one.name);
    view.kept = kept.size ? "#" + kept : "";
    history.replaceState(null, "", view.kept || location.pathname);
  }, 150);
}

function readLink() {
  const kept = new URLSearchParams(location.hash.slice(1)),
    given = kept.size === 0;
  const share = (name) => {
    const value = Number(kept.get(name) ?? 1);
    return value >= 0 && value <= 1 ? value : 1;
  };
  state.nodes = share("nodes");
  state.links = share("links");
  state.through = kept.has("through");
  state.zoom = Math.min(3.375, Math.max(1, Number(kept.get("zoom")) || 1));
  state.query = kept.get("search") || "";
  state.hidden = new Set(kept.getAll("hide").filter((kind) => kind in KINDS));
  let groups = data.qParams?.supernodes;
  try {
    groups = JSON.parse(kept.get("supernodes")) ?? groups;
    state.groups = readGroups(groups);
  } catch {
    state.groups = readGroups(data.qParams?.supernodes);
  } // a link cut short
  for (const one of state.groups) one.open = kept.getAll("open").includes(one.name);
  const grouped = new Set(state.groups.flatMap((one) => idsOf(one.members)));
  const first = [...(data.qParams?.pinnedIds || []).filter((id) => !grouped.has(id)), data.qParams?.clickedId].filter(
    Boolean,
  );
  state.pinned = [...new Set(given ? first : kept.getAll("pin"))].filter((id) => itemOf(id) !== null);
  state.hover = null;
}

// ---- start

function showHeader() {
  const about = data.metadata.cltjax || {};
  at("title").textContent = data.metadata.slug || "Attribution graph";
  at("about").textContent = [
    about.model || data.metadata.scan,
    about.clt && `CLT ${about.clt}`,
    about.targets && `targets: ${about.targets}`,
  ]
    .filter(Boolean)
    .join(" · ");
  const prompt = data.metadata.prompt || (data.metadata.prompt_tokens || []).join("");
  // An image is hundreds of the same token.
  at("prompt").textContent = prompt.replace(
    /(<[^<>\s]{1,40}>|\[IMG\])\1{2,}/g,
    (all, one) => `${one}×${all.length / one.length}`,
  );
  at("answer").textContent = about.answer ?? "";
  at("answer").parentElement.hidden = !about.answer;
  for (const [name, value] of Object.entries(about.scores || {})) {
    const [title, text] = SCORES[name] || [
      name.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase()),
      "",
    ];
    if (typeof value === "number")
      at("scores").append(
        make("div", { "data-score": name }, make("dt", {}, `${title} ${value.toFixed(3)}`), make("dd", {}, text)),
      );
  }
}

function start() {
  showHeader();
  if (!graph.n) {
    at("empty").hidden = false;
    document.body.classList.add("empty");
    return;
  }
  readColours();
  buildImage();
  view.givenGroups = readGroups(data.qParams?.supernodes).map((one) => [one.name, ...idsOf(one.members)]);
  readLink();
  followGraph();
  followControls();
  showControls();
  rebuild();
  new ResizeObserver(() => layOut()).observe(at("graph"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColours();
    layOut();
  });
  window.addEventListener("hashchange", () => {
    if (location.hash !== view.kept) {
      readLink();
      showControls();
      rebuild();
    }
  });
}

start();
