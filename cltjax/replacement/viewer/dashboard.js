"use strict";
// The dashboard: data.features (FeaturePanels by "LAYER:FEATURE", in the order of data.order) and data.images. A panel is
// drawn when it comes near the window, so that hundreds of them cost nothing until they are looked at.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const keys = data.order.filter((key) => Object.hasOwn(data.features, key));
  const panels = new Map(keys.map((key) => [key, data.features[key]]));
  const articles = new Map();
  const given = new Map(keys.map((key, i) => [key, i]));
  let shown = [];

  const searched = new Map(
    keys.map((key) => {
      const panel = panels.get(key);
      return [key, { label: String(panel.label ?? "").toLowerCase(), tokens: panel.promoted.map(([token]) => String(token).trim().toLowerCase()) }];
    }),
  );

  const byId = (a, b) => panels.get(a).layer - panels.get(b).layer || panels.get(a).feature - panels.get(b).feature;
  const falling = (of) => (a, b) => of(panels.get(b)) - of(panels.get(a)) || given.get(a) - given.get(b);
  const orders = {
    given: (a, b) => given.get(a) - given.get(b),
    density: falling((panel) => panel.density),
    rare: falling((panel) => -panel.density),
    max: falling((panel) => panel.max),
    image: falling((panel) => panel.modality.image),
    id: byId,
  };

  /** Whether a feature is what is asked for: its id begins so, its label has it, or a token it promotes begins so. */
  function matches(key, query) {
    if (!query) return true;
    const { label, tokens } = searched.get(key);
    return key === query || key.startsWith(query.includes(":") ? query : `${query}:`) || label.includes(query) || tokens.some((token) => token.startsWith(query));
  }

  const drawer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        drawer.unobserve(target);
        renderPanel(target, panels.get(target.dataset.key), data.images, { choose: go, has: (key) => panels.has(key) });
      }
    },
    { rootMargin: "900px 0px" },
  );

  function article(key) {
    if (!articles.has(key)) {
      const made = document.createElement("article");
      made.dataset.key = key;
      made.tabIndex = -1;
      made.setAttribute("aria-label", `feature ${key}`);
      articles.set(key, made);
      drawer.observe(made);
    }
    return articles.get(key);
  }

  function update() {
    const query = at("search").value.trim().toLowerCase(), layer = at("layer").value, modality = at("modality").value;
    shown = keys.filter((key) => {
      const panel = panels.get(key);
      if (layer && String(panel.layer) !== layer) return false;
      if (modality && !(panel.modality[modality] >= 0.5)) return false;
      if (at("labelled").checked && !panel.label) return false;
      return matches(key, query);
    });
    shown.sort(orders[at("sort").value]);
    at("features").replaceChildren(...shown.map(article));
    at("count").textContent = shown.length === keys.length ? `${keys.length} features` : `${shown.length} of ${keys.length} features`;
    at("nothing").hidden = shown.length > 0;
  }

  /** Bring a feature into view; filters that hide it are taken away. */
  function go(key) {
    if (!panels.has(key)) return;
    if (!shown.includes(key)) {
      clear();
    }
    const target = article(key);
    // what is above has to have its height before it is scrolled past
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
    requestAnimationFrame(() => target.scrollIntoView({ block: "start" }));
    history.replaceState(null, "", `#${key}`);
  }

  function clear() {
    at("search").value = "";
    at("layer").value = "";
    at("modality").value = "";
    at("labelled").checked = false;
    update();
  }

  function current() {
    const focused = document.activeElement?.closest?.("article")?.dataset.key;
    if (focused) return shown.indexOf(focused);
    const top = at("controls").getBoundingClientRect().bottom;
    return shown.findIndex((key) => articles.get(key).getBoundingClientRect().bottom > top + 8) - 1;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=search], select");
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      clear();
    } else if (typing) {
      if (event.key === "Enter" && shown.length) go(shown[0]);
    } else if (event.key === "/") {
      event.preventDefault();
      at("search").focus();
    } else if (event.key === "j" || event.key === "k") {
      const next = shown[Math.max(0, current() + (event.key === "j" ? 1 : -1))];
      if (next) go(next);
    } else if (event.key === "r") {
      const details = articles.get(shown[Math.max(0, current())])?.querySelector("details");
      if (details) details.open = !details.open;
    }
  });

  at("controls").addEventListener("input", update);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => go(decodeURIComponent(location.hash.slice(1))));

  at("title").textContent = data.title;
  at("about").textContent = data.about;
  at("only").hidden = !keys.some((key) => panels.get(key).label);
  for (const layer of [...new Set(keys.map((key) => panels.get(key).layer))].sort((a, b) => a - b)) {
    at("layer").append(Object.assign(document.createElement("option"), { value: String(layer), textContent: String(layer) }));
  }
  update();
  if (location.hash) go(decodeURIComponent(location.hash.slice(1)));
})();
