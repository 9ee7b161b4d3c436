"use strict";
// renderPanel(element, panel, images, options): fills an element with one FeaturePanel (docs/graphs.md).
//   images    data URLs by key, of the panel's examples
//   options   open: show random examples at once; choose(key): called when a near feature is chosen; has(key): whether
//             it can be
// Texts come from data sets: they are shown by textContent, never as HTML. What a panel lacks is left out.

globalThis.renderPanel = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const FAINTEST = 0.12; // of the activation's colour, where a feature is active at all

  /** An element with attributes and children; a child that is a string becomes text. */
  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function draw(tag, attributes = {}, title = "") {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (title) made.append(Object.assign(document.createElementNS(SVG, "title"), { textContent: title }));
    return made;
  }

  const minus = (text) => text.replace("-", "−");

  function figure(value) {
    if (!Number.isFinite(value)) return "";
    const size = Math.abs(value);
    return minus(size && (size >= 1e5 || size < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(3))));
  }

  function percent(share) {
    if (!Number.isFinite(share)) return "";
    if (share > 0 && share < 1e-5) return "<0.001%";
    return `${share < 0.1 ? Number((100 * share).toPrecision(2)) : Math.round(100 * share)}%`;
  }

  const strength = (value, most) => (value > 0 && most > 0 ? FAINTEST + (1 - FAINTEST) * Math.min(1, value / most) : 0);

  // ---- figures

  function head(panel) {
    const name = make("h3", { class: "panel-name" }, make("span", { class: "panel-id" }, `${panel.layer}:${panel.feature}`));
    if (panel.label) {
      name.append(" ", make("span", { class: "panel-label" }, String(panel.label)));
      if (Number.isFinite(panel.score)) name.append(" ", make("span", { class: "panel-score", title: "how well the label predicts the feature, on held-out samples" }, figure(panel.score)));
    }
    return name;
  }

  function facts(panel) {
    const list = make("dl", { class: "panel-facts" });
    const add = (term, text, title = "") => list.append(make("div", title ? { title } : {}, make("dt", {}, term), make("dd", {}, text)));
    add("active on", percent(panel.density), `of ${Number(panel.rows || 0).toLocaleString("en")} tokens`);
    add("largest", figure(panel.max));
    const shares = panel.modality || {};
    if (panel.density > 0) {
      const bar = make("span", { class: "panel-shares", role: "img" });
      const said = [];
      for (const kind of ["image", "text", "special"]) {
        if (!(shares[kind] > 0)) continue;
        const part = make("span", { class: `panel-share-${kind}` });
        part.style.flexGrow = shares[kind];
        bar.append(part);
        said.push(`${percent(shares[kind])} ${kind}`);
      }
      bar.setAttribute("aria-label", said.join(", "));
      list.append(make("div", { title: "where it is active" }, make("dt", {}, "on"), make("dd", {}, bar, said.join(", "))));
    }
    return list;
  }

  /** Bars [label, value, title] above a line, with the first and the last label, or all of them where they fit. */
  function bars(name, items, ends) {
    const width = 168, height = 44, gap = items.length > 20 ? 0.5 : 2;
    const most = Math.max(...items.map((item) => item[1]), 0);
    const said = `${name}: ${items.map((item) => item[2]).join("; ")}`;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "panel-bars", role: "img", "aria-label": said });
    const step = width / Math.max(items.length, 1);
    items.forEach(([, value, title], i) => {
      const tall = most > 0 && value > 0 ? Math.max(1, (value / most) * (height - 2)) : 0;
      const place = { x: i * step + gap / 2, width: Math.max(0.5, Math.min(step - gap, 22)) };
      svg.append(draw("rect", { ...place, y: height - tall, height: tall, class: "panel-bar" }));
      svg.append(draw("rect", { x: i * step, y: 0, width: step, height, class: "panel-bar-hit" }, title));
    });
    svg.append(draw("line", { x1: 0, x2: width, y1: height, y2: height, class: "panel-axis" }));
    const labels = make("div", { class: ends ? "panel-ends" : "panel-ticks" });
    for (const text of ends || items.map((item) => item[0])) {
      const label = make("span", {}, text);
      if (!ends) label.style.width = `${100 / items.length}%`;
      labels.append(label);
    }
    return make("figure", { class: "panel-chart" }, make("figcaption", {}, name), svg, labels);
  }

  function charts(panel) {
    const found = make("div", { class: "panel-charts" });
    const { edges = [], counts = [] } = panel.histogram || {};
    if (counts.length) {
      const items = counts.map((n, i) => ["", n, `${figure(edges[i])} to ${figure(edges[i + 1])}: ${n.toLocaleString("en")}`]);
      found.append(bars("activations", items, ["0", figure(edges[edges.length - 1])]));
    }
    const norms = panel.decoder_norms || [];
    if (norms.length) {
      const items = norms.map(([layer, norm]) => [String(layer), norm, `layer ${layer}: ${figure(norm)}`]);
      const ends = norms.length > 14 ? [`layer ${norms[0][0]}`, `layer ${norms[norms.length - 1][0]}`] : null;
      found.append(bars("decoder norms by layer", items, ends));
    }
    return found;
  }

  // ---- tokens and features

  function visible(token) {
    const text = String(token);
    return text.trim() === "" ? text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅" : text.trim().replaceAll("\n", "⏎");
  }

  function chips(name, items, sign) {
    const row = make("div", { class: "panel-chips" });
    for (const [token, effect] of items) {
      row.append(make("span", { class: "panel-chip", title: `${JSON.stringify(String(token))}: ${figure(effect)}` }, visible(token), make("small", {}, figure(Math.abs(effect)))));
    }
    return make("div", { class: `panel-tokens panel-${sign}` }, make("span", { class: "panel-term" }, name), row);
  }

  function near(panel, options) {
    const found = make("div", { class: "panel-near" });
    const alike = panel.nearest || [];
    const same = alike.filter(([key]) => key.split(":")[0] === String(panel.layer));
    const other = alike.filter((pair) => !same.includes(pair));
    for (const [name, items, title] of [[`near, layer ${panel.layer}`, same, "cosine of concatenated decoders"], ["near, others", other, "cosine of decoders summed over layers"]]) {
      if (!items.length) continue;
      const row = make("div", { class: "panel-chips" });
      for (const [key, cosine] of items) {
        const known = options.choose && (!options.has || options.has(key));
        const chip = make(known ? "button" : "span", { class: "panel-chip", title, ...(known ? { type: "button" } : {}) }, key, make("small", {}, figure(cosine)));
        if (known) chip.addEventListener("click", () => options.choose(key));
        row.append(chip);
      }
      found.append(make("div", { class: "panel-tokens" }, make("span", { class: "panel-term", title }, name), row));
    }
    return found;
  }

  // ---- examples

  let masks = 0; // drawn so far: their ids have to differ

  function picture(example, source, most) {
    const frame = make("div", { class: "panel-image" });
    const image = make("img", { src: source, alt: `image of ${example.sample}`, loading: "lazy", decoding: "async" });
    image.addEventListener("load", () => image.classList.toggle("panel-pixels", Math.max(image.naturalWidth, image.naturalHeight) < 100));
    // What is not active is veiled, so that the colours of what is can be seen as they are.
    const over = draw("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
    const name = `panel-mask-${masks++}`;
    const mask = draw("mask", { id: name, maskUnits: "userSpaceOnUse", x: 0, y: 0, width: 1, height: 1 });
    mask.append(draw("rect", { x: 0, y: 0, width: 1, height: 1, fill: "white" }));
    const strongest = Math.max(0, ...(example.patches || []).map((patch) => strength(patch[4], most)));
    const veil = { x: 0, y: 0, width: 1, height: 1, class: "panel-veil", opacity: strongest, mask: `url(#${name})` };
    over.append(mask, draw("rect", veil));
    for (const [x, y, width, height, value] of example.patches || []) {
      const place = { x, y, width, height }, opacity = strength(value, most);
      mask.append(draw("rect", { ...place, fill: "black", "fill-opacity": opacity }));
      over.append(draw("rect", { ...place, class: "panel-patch", "stroke-opacity": opacity }, figure(value)));
    }
    frame.append(image, over);
    return frame;
  }

  function prompt(example, most) {
    const text = make("p", { class: "panel-text" });
    const tokens = example.tokens || [], values = example.values || [];
    const start = Number.isInteger(example.generated) ? example.generated : tokens.length;
    const answer = make("span", { class: "panel-answer", title: "the answer" });
    tokens.forEach((token, i) => {
      const part = make("span", {}, i === 0 ? String(token).trimStart() : String(token));
      const value = values[i] || 0;
      if (value > 0) {
        part.className = "panel-token";
        part.title = figure(value);
        part.style.setProperty("--strength", `${Math.round(85 * strength(value, most))}%`);
      }
      if (i === start && i > 0) {
        part.textContent = String(token).trimStart();
        text.append(" ");
      }
      (i < start ? text : answer).append(part);
    });
    if (start < tokens.length) text.append(answer);
    return text;
  }

  function card(example, images, most) {
    const made = make("li", { class: "panel-example" });
    const source = example.image !== null && Object.hasOwn(images, example.image) ? images[example.image] : null;
    if (source) made.append(picture(example, source, most));
    const body = make("div", { class: "panel-body" }, prompt(example, most));
    const notes = [`peak ${figure(example.peak)}`];
    if (example.unplaced > 0) notes.push(`${example.unplaced} active image token${example.unplaced > 1 ? "s" : ""} not shown`);
    body.append(make("p", { class: "panel-note" }, [...notes, String(example.sample)].join(" · ")));
    made.append(body);
    return made;
  }

  function examples(list, images, most) {
    return make("ol", { class: "panel-examples" }, ...list.map((example) => card(example, images, most)));
  }

  return function renderPanel(element, panel, images, options = {}) {
    const all = make("div", { class: "panel" }, head(panel), facts(panel));
    if (!(panel.density > 0)) all.append(make("p", { class: "panel-note" }, "Not active on these tokens."));
    all.append(charts(panel));
    const words = make("div", { class: "panel-words" });
    if ((panel.promoted || []).length) words.append(chips("promotes", panel.promoted, "positive"));
    if ((panel.suppressed || []).length) words.append(chips("suppresses", panel.suppressed, "negative"));
    words.append(near(panel, options));
    all.append(words);
    const top = panel.top || [], random = panel.random || [];
    if (top.length) all.append(make("h4", {}, "Strongest examples"), examples(top, images || {}, panel.max));
    if (random.length) {
      const more = make("details", {}, make("summary", {}, "Random examples"));
      const fill = () => more.open && more.children.length === 1 && more.append(examples(random, images || {}, panel.max));
      more.addEventListener("toggle", fill);
      more.open = Boolean(options.open);
      fill();
      all.append(more);
    }
    element.replaceChildren(all);
  };
})();
