"use strict";

// Lists of queries: one stop of the Tab key each, arrow keys within.
for (const list of document.querySelectorAll("[role=listbox]")) {
  const options = [...list.children];
  let chosen = 0;
  const choose = (number) => {
    const target = Math.max(0, Math.min(options.length - 1, number));
    for (const [index, hide] of [[chosen, true], [target, false]]) {
      options[index].setAttribute("aria-selected", String(!hide));
      document.getElementById(options[index].dataset.panel).hidden = hide;
    }
    chosen = target;
    list.setAttribute("aria-activedescendant", options[target].id);
    // Within the list alone: the page stays where it is.
    const { offsetTop: top, offsetHeight: height } = options[target];
    list.scrollTop = Math.min(Math.max(list.scrollTop, top + height - list.clientHeight), top);
  };
  list.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(chosen + steps[event.key]);
  });
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose(options.indexOf(option));
  });
}

const SVG = "http://www.w3.org/2000/svg";
const svg = (name, attributes) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const percent = (weight) => `${(weight / 100).toFixed(1)}\u202f%`;

// The picture of a pair with its regions; returns what shows a row of weights, in ten-thousandths.
function drawStage(stage, pair) {
  const [picture, width, height] = pair.thumbnail ?? [null, 400, 300];
  const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": pair.image });
  canvas.style.setProperty("--aspect", width / height);
  canvas.append(svg("rect", { class: "ground", width, height }));
  if (picture) canvas.append(svg("image", { href: picture, width, height }));
  stage.replaceChildren(canvas);
  const regions = (pair.attention?.boxes ?? []).map(([x1, y1, x2, y2], number) => {
    const corner = { x: (x1 / 1000) * width, y: (y1 / 1000) * height };
    const box = svg("rect", { ...corner, class: "region", width: ((x2 - x1) / 1000) * width, height: ((y2 - y1) / 1000) * height });
    const tag = svg("text", { x: corner.x + 3, y: corner.y + 13, class: "tag" });
    tag.textContent = number;
    canvas.append(box);
    return { box, tag };
  });
  canvas.append(...regions.map((region) => region.tag)); // above all boxes
  return (weights) => {
    const most = Math.max(...weights, 1);
    const order = weights.map((_, number) => number).sort((one, other) => weights[other] - weights[one]);
    regions.forEach(({ box, tag }, number) => {
      box.style.setProperty("--weight", weights[number] / most);
      tag.classList.toggle("shown", order.indexOf(number) < 3);
    });
    return order.slice(0, 3).map((number) => `region ${number} (${percent(weights[number])})`).join(", ");
  };
}

function drawWords(toolbar, told, attention, show) {
  const mean = attention.boxes.map((_, region) => attention.weights.reduce((sum, row) => sum + row[region], 0) / attention.words.length);
  const rows = [["all words", mean], ...attention.words.map((word, number) => [word, attention.weights[number]])];
  const buttons = rows.map(([word, weights], number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = number ? -1 : 0;
    button.textContent = word;
    if (!number) button.className = "all";
    const choose = () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      told.textContent = `${number ? `“${word}” attends` : "All words on average attend"} most to ${show(weights)}.`;
    };
    button.addEventListener("pointerenter", choose);
    button.addEventListener("focus", () => {
      for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
      choose();
    });
    return button;
  });
  toolbar.onkeydown = (event) => {
    const at = buttons.indexOf(document.activeElement);
    const target = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (target === undefined || !buttons[target]) return;
    event.preventDefault();
    buttons[target].focus();
  };
  toolbar.replaceChildren(...buttons);
  return buttons[0];
}

const overlay = document.getElementById("overlay");
const part = (selector) => overlay.querySelector(selector);

function open(pair) {
  part("h2 bdi").textContent = pair.caption;
  part(".meta").textContent = `${pair.image} · ${pair.run} · rank ${pair.rank.toLocaleString("en")}, score ${pair.precisely} · ${pair.right ? "✓ right" : "✗ wrong"}`;
  const show = drawStage(part(".stage"), pair);
  part(".words").hidden = part(".told").hidden = !pair.attention;
  part(".stage").hidden = !pair.attention && !pair.thumbnail;
  part(".legend-note").textContent = pair.attention
    ? "Attention of words to regions in the last layer, mean of its heads; each word’s sums to 100 %. The bolder a box, the more. Boxes are drawn over " +
      (pair.thumbnail ? "the picture." : "an empty frame of unknown proportions, as there is no picture.")
    : "There is no attention to show for this run; the section Origin says why.";
  const first = pair.attention ? drawWords(part(".words"), part(".told"), pair.attention, show) : part(".close");
  overlay.showModal();
  first.focus();
}

for (const button of document.querySelectorAll(".answer")) {
  button.addEventListener("click", () => {
    const pairs = JSON.parse(document.getElementById(`data-${button.dataset.query}`).textContent);
    open(pairs[Number(button.dataset.pair)]);
  });
}
part(".close").addEventListener("click", () => overlay.close());
overlay.addEventListener("click", (event) => {
  if (event.target === overlay) overlay.close(); // the backdrop
});
