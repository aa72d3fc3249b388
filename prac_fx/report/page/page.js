
"use strict";
// Everything below adds to a page that is complete without it. Text from the report only ever goes through
// textContent, so that nothing in it can become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
document.documentElement.classList.add("js");

function nbytesText(nbytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(nbytes) >= 1024 && unit < units.length - 1) {
    nbytes /= 1024;
    unit += 1;
  }
  return `${nbytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

// -- timeline: a cursor that fills the legend ------------------------------------------------------

function setUpTimeline() {
  const cursor = make("div", "cursor");
  const line = make("i");
  line.hidden = true;
  cursor.append(line);
  cursor.tabIndex = 0;
  cursor.setAttribute("role", "slider");
  cursor.setAttribute("aria-label", "moment in the step");
  cursor.setAttribute("aria-valuemin", "0");
  cursor.setAttribute("aria-valuemax", "1000");
  byId("chart").append(cursor);
  const caption = byId("moment");
  const rows = [...byId("legend").querySelectorAll("tr[data-category]")];
  const atPeak = rows.map((row) => [row.cells[1].textContent, row.cells[2].textContent]);
  const captionAtPeak = [...caption.childNodes];
  const steps = [data.before, data.after];
  let position = data.before.left[indexOfPeak(data.before)];

  function indexAt(step, x) {
    let low = 0;
    let high = step.left.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (step.left[middle] <= x) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  function show(x) {
    position = Math.min(1, Math.max(0, x));
    const at = steps.map((step) => indexAt(step, position));
    line.hidden = false;
    line.style.left = `${100 * position}%`;
    for (const row of rows) {
      steps.forEach((step, side) => {
        const column = row.dataset.category ? step.categories[row.dataset.category] : step.nbytes;
        row.cells[side + 1].textContent = nbytesText(column ? column[at[side]] : 0);
      });
    }
    const span = data.spans.find((one) => position <= one[2]) || data.spans[data.spans.length - 1];
    const events = steps.map(
      (step, side) => `${data.names[side]}: ${step.labels[at[side]]} (event ${step.events[at[side]]})`,
    );
    caption.textContent = `${span[0]}. ${events.join(". ")}`;
    cursor.setAttribute("aria-valuenow", String(Math.round(1000 * position)));
    cursor.setAttribute(
      "aria-valuetext",
      `${span[0]}, ${steps.map((step, side) => `${data.names[side]} ${nbytesText(step.nbytes[at[side]])}`).join(", ")}`,
    );
  }

  function rest() {
    line.hidden = true;
    rows.forEach((row, index) => {
      row.cells[1].textContent = atPeak[index][0];
      row.cells[2].textContent = atPeak[index][1];
    });
    caption.replaceChildren(...captionAtPeak);
  }

  // to the next event of either step
  function next(direction) {
    const places = steps.flatMap((step) => step.left);
    const ahead = places.filter((left) => (left - position) * direction > 1e-9);
    if (ahead.length) show(direction > 0 ? Math.min(...ahead) : Math.max(...ahead));
  }

  cursor.addEventListener("pointermove", (event) => {
    const box = cursor.getBoundingClientRect();
    show((event.clientX - box.left) / box.width);
  });
  cursor.addEventListener("pointerleave", () => {
    if (document.activeElement !== cursor) rest();
  });
  cursor.addEventListener("focus", () => show(position));
  cursor.addEventListener("blur", rest);
  cursor.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: () => next(1),
      ArrowLeft: () => next(-1),
      PageUp: () => show(position + 0.05),
      PageDown: () => show(position - 0.05),
      Home: () => show(0),
      End: () => show(1),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });
  cursor.setAttribute("aria-valuenow", String(Math.round(1000 * position)));
}

function indexOfPeak(step) {
  let best = 0;
  step.nbytes.forEach((nbytes, index) => {
    if (nbytes > step.nbytes[best]) best = index;
  });
  return best;
}

// -- treemap ---------------------------------------------------------------------------------------

// An item is [module, name, category, decision, bytes before, bytes after, note].
function tree(items, side) {
  const root = { name: "", path: "", children: new Map(), leaves: [], nbytes: 0 };
  for (const [module, name, category, decision, before, after, note] of items) {
    const nbytes = side === "before" ? before : after;
    if (!nbytes) continue;
    let node = root;
    root.nbytes += nbytes;
    for (const part of module ? module.split(".") : []) {
      if (!node.children.has(part)) {
        const path = node.path ? `${node.path}.${part}` : part;
        node.children.set(part, { name: part, path, children: new Map(), leaves: [], nbytes: 0 });
      }
      node = node.children.get(part);
      node.nbytes += nbytes;
    }
    node.leaves.push({ name, path: module, category, decision, nbytes, note });
  }
  return root;
}

// a module with one child and nothing of its own has nothing to show
function unwrapped(node) {
  while (node.children && node.children.size === 1 && !node.leaves.length) {
    const child = [...node.children.values()][0];
    node = { ...child, name: node.name ? `${node.name}.${child.name}` : child.name };
  }
  // the one value of a module stands for it
  if (node.children && !node.children.size && node.leaves.length === 1) {
    return { ...node.leaves[0], name: node.name };
  }
  return node;
}

function parts(node) {
  const all = [...[...node.children.values()].map(unwrapped), ...node.leaves];
  return all.sort((a, b) => b.nbytes - a.nbytes);
}

// Squarified treemap (Bruls, Huizing, van Wijk 2000): rows along the shorter side while ratios improve.
function squarify(nodes, x, y, width, height, place) {
  const total = nodes.reduce((sum, node) => sum + node.nbytes, 0);
  const scale = total ? (width * height) / total : 0;
  let index = 0;
  while (index < nodes.length && width > 0.5 && height > 0.5) {
    const short = Math.min(width, height);
    let area = 0;
    let worst = Infinity;
    let end = index;
    while (end < nodes.length) {
      const next = area + nodes[end].nbytes * scale;
      const first = nodes[index].nbytes * scale;
      const last = nodes[end].nbytes * scale;
      const ratio = Math.max((short * short * first) / (next * next), (next * next) / (short * short * last));
      if (ratio > worst) break;
      worst = ratio;
      area = next;
      end += 1;
    }
    const thick = area / short;
    let along = 0;
    for (; index < end; index += 1) {
      const long = (nodes[index].nbytes * scale) / thick;
      if (width >= height) place(nodes[index], x, y + along, thick, long);
      else place(nodes[index], x + along, y, long, thick);
      along += long;
    }
    if (width >= height) {
      x += thick;
      width -= thick;
    } else {
      y += thick;
      height -= thick;
    }
  }
}

// what is too small to see is drawn as one
function gathered(nodes, area) {
  const total = nodes.reduce((sum, node) => sum + node.nbytes, 0);
  const seen = nodes.filter((node) => (node.nbytes / total) * area >= 40);
  const rest = nodes.slice(seen.length);
  if (rest.length < 2) return nodes;
  const nbytes = rest.reduce((sum, node) => sum + node.nbytes, 0);
  const all = { children: new Map(), leaves: rest };
  const colour = { category: main(all, "category"), decision: main(all, "decision") };
  return [...seen, { name: `${rest.length} smaller`, path: "", nbytes, note: "", ...colour }];
}

// the category, or the decision, with the most bytes
function main(node, property) {
  const sums = {};
  const add = (one) => {
    if (one.children) [...one.children.values(), ...one.leaves].forEach(add);
    else sums[one[property]] = (sums[one[property]] || 0) + one.nbytes;
  };
  add(node);
  return Object.keys(sums).sort((a, b) => sums[b] - sums[a])[0];
}

function setUpMap() {
  const map = byId("map");
  const readout = byId("map-readout");
  let open = [];
  let shown = 1;

  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

  function current() {
    const side = chosen("map-side");
    const items = chosen("map-what") === "saved" ? data.values : data.live[side];
    let node = tree(items, side);
    const found = [];
    for (const part of open) {
      if (!node.children.has(part)) break;
      node = node.children.get(part);
      found.push(part);
    }
    open = found;
    return node;
  }

  function describe(node) {
    const where = node.path && node.path !== node.name ? `${node.path}${node.children ? "" : ` ${node.name}`}` : node.name;
    const share = `${((100 * node.nbytes) / shown).toFixed(1)}%`;
    readout.textContent = [where, nbytesText(node.nbytes), share, node.note].filter(Boolean).join(", ");
  }

  function element(node, isGroup, x, y, width, height) {
    const opens = Boolean(node.children);
    const tag = opens ? "button" : "div";
    const colour = `c-${main(node, "category")} d-${main(node, "decision")}`;
    const box = make(tag, isGroup ? "group" : `cell ${colour}`);
    if (opens) box.type = "button";
    box.tabIndex = -1;
    Object.assign(box.style, { left: `${x}px`, top: `${y}px`, width: `${Math.max(0, width - 1.5)}px`, height: `${Math.max(0, height - 1.5)}px` });
    box.setAttribute("aria-label", `${node.name}, ${nbytesText(node.nbytes)}`);
    if (!opens) box.setAttribute("role", "img");
    if (isGroup || (width > 34 && height > 20)) {
      box.append(make("span", "", node.name));
      if (!isGroup && height > 38) box.append(make("span", "", nbytesText(node.nbytes)));
    } else {
      box.classList.add("small");
    }
    box.addEventListener("pointerenter", () => describe(node));
    box.addEventListener("focus", () => describe(node));
    if (opens) box.addEventListener("click", () => zoom(node.path.split(".")));
    return box;
  }

  function draw(node, x, y, width, height, depth) {
    squarify(gathered(parts(node), width * height), x, y, width, height, (one, left, top, w, h) => {
      const isGroup = Boolean(one.children) && depth < 4 && w > 84 && h > 64;
      map.append(element(one, isGroup, left, top, w, h));
      if (isGroup) draw(one, left + 3, top + 20, w - 6.5, h - 24.5, depth + 1);
    });
  }

  function crumbs(node) {
    const bar = byId("crumbs");
    bar.replaceChildren();
    ["all modules", ...open].forEach((name, depth) => {
      const button = make("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => zoom(open.slice(0, depth)));
      if (depth) bar.append(make("span", "", "/"));
      bar.append(button);
    });
    bar.append(make("span", "total", nbytesText(node.nbytes)));
  }

  function render() {
    const node = current();
    shown = node.nbytes || 1;
    map.replaceChildren();
    crumbs(node);
    readout.textContent = "\u00a0";
    byId("shades").hidden = chosen("map-what") !== "saved";
    draw(node, 0, 0, map.clientWidth, map.clientHeight, 0);
    if (map.firstElementChild) map.firstElementChild.tabIndex = 0;
  }

  function zoom(path) {
    const hadFocus = map.contains(document.activeElement);
    open = path;
    render();
    if (hadFocus && map.firstElementChild) map.firstElementChild.focus();
  }

  map.addEventListener("keydown", (event) => {
    const boxes = [...map.children];
    const index = boxes.indexOf(document.activeElement);
    if (event.key === "Escape" && open.length) zoom(open.slice(0, -1));
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const target = step && boxes[index + step];
    if (!target) return;
    event.preventDefault();
    boxes[index].tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  });
  for (const input of document.querySelectorAll('input[name="map-what"], input[name="map-side"]')) {
    input.addEventListener("change", render);
  }
  let width = 0;
  new ResizeObserver(() => {
    if (map.clientWidth === width) return;
    width = map.clientWidth;
    render();
  }).observe(map);
}

// -- value table: sort, filter, a page at a time -----------------------------------------------------

function setUpValues() {
  const PAGE = 100;
  const table = byId("value-table");
  const headers = [...table.tHead.rows[0].cells];
  const bodies = { merged: byId("merged"), each: byId("each") };
  const rows = { merged: [...bodies.merged.rows], each: [...bodies.each.rows] };
  const texts = new Map();
  for (const row of [...rows.merged, ...rows.each]) texts.set(row, row.textContent.toLowerCase());
  let limit = PAGE;

  function update() {
    const kind = byId("merge").checked ? "merged" : "each";
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const decision = byId("decision").value;
    bodies.merged.hidden = kind !== "merged";
    bodies.each.hidden = kind !== "each";
    let found = 0;
    for (const row of rows[kind]) {
      const text = texts.get(row);
      const matches = (!decision || row.dataset.decision === decision) && words.every((word) => text.includes(word));
      found += matches ? 1 : 0;
      row.hidden = !matches || found > limit;
    }
    byId("count").textContent = `${found} of ${rows[kind].length} rows`;
    byId("more").hidden = found <= limit;
    byId("more").textContent = `Show the other ${found - limit}`;
  }

  function key(row, column, kind) {
    const cell = row.cells[column];
    return kind === "number" ? Number(cell.dataset.value) : cell.textContent;
  }

  function sort(column) {
    const header = headers[column];
    const kind = header.dataset.sort;
    const current = header.getAttribute("aria-sort");
    const first = kind === "number" ? "descending" : "ascending";
    const other = kind === "number" ? "ascending" : "descending";
    const order = current === first ? other : first;
    for (const one of headers) one.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const collator = new Intl.Collator(undefined, { numeric: true });
    const compare = kind === "number" ? (a, b) => a - b : (a, b) => collator.compare(a, b);
    for (const name of Object.keys(rows)) {
      const keyed = rows[name].map((row) => [key(row, column, kind), row]);
      keyed.sort((a, b) => sign * compare(a[0], b[0]));
      rows[name] = keyed.map((pair) => pair[1]);
      bodies[name].append(...rows[name]);
    }
    update();
  }

  headers.forEach((header, column) => {
    if (!header.dataset.sort) return;
    const button = make("button", "", header.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(column));
    header.replaceChildren(button);
  });
  const again = () => {
    limit = PAGE;
    update();
  };
  byId("filter").addEventListener("input", again);
  byId("decision").addEventListener("change", again);
  byId("merge").addEventListener("change", again);
  byId("more").addEventListener("click", () => {
    limit = Infinity;
    update();
  });
  headers[2].setAttribute("aria-sort", "descending");
  update();
}

if (data.spans) setUpTimeline();
setUpMap();
setUpValues();
