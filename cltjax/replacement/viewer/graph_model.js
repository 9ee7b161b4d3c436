"use strict";
// An attribution graph as arrays, and sums over its links. Nothing here touches the document or keeps state.
//
// A *node* is an index into data.nodes, a *link* into the arrays from, to and weight. `view` says what is shown:
// live[link], inflow[node] (sum of |weight| of its shown inputs), drawnAs[node] (itself, or its closed supernode).

/** The layer and index of a feature from circuit-tracer's number of it (Cantor's pairing). */
function unpair(number) {
  const diagonal = Math.floor((Math.sqrt(8 * number + 1) - 1) / 2);
  const second = number - (diagonal * (diagonal + 1)) / 2;
  return [diagonal - second, second];
}

/** For every node the links that `ends` says are its own, as slices of one array. */
function slices(n, ends) {
  const start = new Int32Array(n + 1),
    links = new Int32Array(ends.length);
  for (const end of ends) start[end + 1]++;
  for (let i = 0; i < n; i++) start[i + 1] += start[i];
  const next = start.slice();
  ends.forEach((end, link) => {
    links[next[end]++] = link;
  });
  return (node) => links.subarray(start[node], start[node + 1]);
}

/** Arrays over nodes and over the links between them. */
function readGraph(data) {
  const nodes = data.nodes,
    n = nodes.length,
    index = new Map(nodes.map((node, i) => [node.node_id, i]));
  const positions =
    data.positions || (data.metadata.prompt_tokens || []).map((token) => ({ token, modality: "text", rect: null }));
  const kind = nodes.map((node) => kindOf(node, positions[node.ctx_idx]));
  const nLayers =
    data.metadata.cltjax?.n_layers ??
    1 +
      Math.max(
        -1,
        ...nodes.filter((_, i) => kind[i] !== "logit" && nodes[i].layer !== "E").map((node) => Number(node.layer)),
      );
  const level = nodes.map((node, i) =>
    kind[i] === "logit" ? nLayers + 1 : node.layer === "E" ? 0 : Number(node.layer) + 1,
  );
  const known = data.links.filter((link) => index.has(link.source) && index.has(link.target));
  const from = Int32Array.from(known, (link) => index.get(link.source)),
    to = Int32Array.from(known, (link) => index.get(link.target));
  const weight = Float64Array.from(known, (link) => link.weight);
  const order = Int32Array.from(known.keys());
  const strongest = order.slice().sort((a, b) => Math.abs(weight[b]) - Math.abs(weight[a]));
  const before = new Float64Array(known.length); // share of all |weight| that stronger links have
  const total = weight.reduce((sum, value) => sum + Math.abs(value), 0);
  let sum = 0;
  for (const link of strongest) {
    before[link] = sum / total;
    sum += Math.abs(weight[link]);
  }
  const patches = new Map(); // position -> the embeddings that stand for its patch
  nodes.forEach((node, i) => {
    if (kind[i] !== "patch") return;
    for (const position of node.member_idx || [node.ctx_idx])
      patches.set(position, [...(patches.get(position) || []), i]);
  });
  return {
    nodes,
    n,
    index,
    positions,
    kind,
    nLayers,
    level,
    from,
    to,
    weight,
    strongest,
    before,
    patches,
    upward: order.sort((a, b) => level[to[a]] - level[to[b]]), // links run to higher levels: an order in which sums are whole
    into: slices(n, to),
    outOf: slices(n, from),
    patchNumber: new Map(
      positions
        .map((p, i) => [p, i])
        .filter(([p]) => p.rect || p.modality === "image")
        .map(([, i], number) => [i, number + 1]),
    ),
  };
}

function kindOf(node, position) {
  if (node.feature_type === "logit") return "logit";
  if (node.feature_type === "mlp reconstruction error") return "error";
  if (node.feature_type !== "embedding") return "feature";
  return position?.rect || position?.modality === "image" ? "patch" : "word";
}

/** Sums of shown links between `members` and every other item, strongest first: {ins, outs} of [item, weight]. */
function neighbours(graph, view, members) {
  const inside = new Set(members),
    ins = new Map(),
    outs = new Map();
  const add = (sums, other, link) => {
    if (!view.live[link] || inside.has(other)) return;
    const item = view.drawnAs[other];
    sums.set(item, (sums.get(item) || 0) + graph.weight[link]);
  };
  for (const member of members) {
    for (const link of graph.into(member)) add(ins, graph.from[link], link);
    for (const link of graph.outOf(member)) add(outs, graph.to[link], link);
  }
  const sorted = (sums) => [...sums].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return { ins: sorted(ins), outs: sorted(outs) };
}

/**
 * How much of `members` comes from each node (`back`), or how much of each node comes from them: {strength, net}.
 * Through other nodes a link counts as its share of all absolute input of its target, and paths are summed (as in
 * circuit-tracer's influence, over the shown graph); `net` keeps the signs. Else: the single links, as they are.
 */
function spread(graph, view, members, back, through) {
  const { n, from, to, weight, upward } = graph,
    strength = new Float64Array(n),
    net = new Float64Array(n);
  if (!through) {
    for (const member of members) {
      for (const link of back ? graph.into(member) : graph.outOf(member))
        if (view.live[link]) net[back ? from[link] : to[link]] += weight[link];
    }
    for (const member of members) net[member] = 0;
    return { strength: net.map(Math.abs), net };
  }
  for (const member of members) strength[member] = net[member] = 1 / members.length;
  for (let i = 0; i < upward.length; i++) {
    const link = upward[back ? upward.length - 1 - i : i];
    if (!view.live[link]) continue;
    const near = back ? to[link] : from[link],
      far = back ? from[link] : to[link];
    if (!strength[near] || !view.inflow[to[link]]) continue;
    const share = weight[link] / view.inflow[to[link]];
    strength[far] += strength[near] * Math.abs(share);
    net[far] += net[near] * share;
  }
  for (const member of members) strength[member] = net[member] = 0;
  return { strength, net };
}

/** What starts the paths that end at `members`: shares of patches, words, errors. */
function origins(graph, view, members) {
  const { strength } = spread(graph, view, members, true, true),
    sums = { patch: 0, word: 0, error: 0 };
  strength.forEach((share, i) => {
    if (graph.kind[i] in sums) sums[graph.kind[i]] += share;
  });
  return sums;
}
