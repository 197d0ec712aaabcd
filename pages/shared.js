const get = id => document.getElementById(id);

function element(name, text, parent, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function addImage(src, alt, parent, className = "") {
  return Object.assign(element("img", "", parent, className), {src, alt});
}

// Two images [title, url], one over the other, and a slider that uncovers the second from the right.
function compare(pair, parent) {
  const box = element("div", "", parent, "compare"), slider = element("input", "", parent);
  const [, after] = pair.map(([title, src]) => addImage(src, title, box));
  const uncover = () => { after.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  Object.assign(slider, {type: "range", value: 50, ariaLabel: `left ${pair[0][0]}, right ${pair[1][0]}`});
  slider.title = slider.ariaLabel;
  slider.oninput = uncover;
  uncover();
}

// A line of a list <dl>.
function entry(list, term, text) {
  const line = element("div", "", list);
  element("dt", term, line);
  element("dd", text, line);
}
