// What is wrong with the page as it is drawn now: lists of complaints, all empty for a good one.
(() => {
  const place = node => (node.closest("section")?.id || "header") + ": " +
    node.textContent.trim().slice(0, 40);
  const all = selector => [...document.querySelectorAll(selector)];
  const seen = node => node.getClientRects().length > 0 && node.getBoundingClientRect().width > 0;

  // Colours as [r, g, b, a] with a in 0..1.
  const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const cache = {};
  const rgba = colour => cache[colour] ??= (() => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  })();
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = node => {
    const layers = [];
    for (let up = node; up; up = up.parentElement) {
      const colour = rgba(getComputedStyle(up).backgroundColor);
      layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const opacity = node => {
    let found = 1;
    for (let up = node; up; up = up.parentElement) found *= getComputedStyle(up).opacity;
    return found;
  };

  const pale = [], small = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, node = text.parentElement;
    if (!text.data.trim() || !seen(node) || node.closest("title, style")) continue;
    const style = getComputedStyle(node), drawn = node.closest("svg");
    const ink = [...rgba(drawn ? style.fill : style.color)];
    ink[3] *= opacity(node);
    const below = background(drawn ? drawn.parentElement : node);
    const [light, dark] = [luminance(over(ink, below)), luminance(below)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize) * (drawn ? Math.hypot(node.getScreenCTM().a,
      node.getScreenCTM().b) : 1);
    // WCAG 2: 4.5, or 3 for large letters.
    if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5))
      pale.push(`${ratio.toFixed(2)} ${place(node)}`);
    if (size < 9) small.push(`${size.toFixed(1)}px ${place(node)}`);
  }

  const wide = document.documentElement.scrollWidth > innerWidth
    ? all("body *").filter(node => node.getBoundingClientRect().right > innerWidth + 1 &&
                                   !node.closest(".scroll")).map(place).slice(0, 5)
      .concat(`${document.documentElement.scrollWidth} of ${innerWidth}`) : [];
  const cut = all("svg text").filter(seen).filter(node => {
    const box = node.getBoundingClientRect(), frame = node.closest("svg").getBoundingClientRect();
    return box.left < frame.left - 8 || box.right > frame.right + 8 ||
      box.top < frame.top - 3 || box.bottom > frame.bottom + 3;
  }).map(place);
  const ragged = all("table").filter(table => {
    const held = [];
    [...table.rows].forEach((row, y) => [...row.cells].forEach(cell => {
      for (let i = 0; i < cell.rowSpan; i++) held[y + i] = (held[y + i] || 0) + cell.colSpan;
    }));
    return !table.tBodies.length || !table.tBodies[0].rows.length || new Set(held).size > 1;
  }).map(place);
  const pictures = all("img").filter(node => !node.complete || !node.naturalWidth || !seen(node))
    .map(node => node.alt)
    .concat(all("svg").filter(node => seen(node.parentElement) &&
      (node.getBoundingClientRect().width < 20 || node.getBoundingClientRect().height < 8 ||
       !node.querySelector("path, circle, text, line"))).map(place));
  const lost = all("nav a").filter(link => !document.querySelector(link.getAttribute("href")))
    .map(place);
  const active = all("script, iframe, object, embed, link, base, form, audio, video")
    .map(node => node.tagName)
    .concat(all("body *").filter(node => [...node.attributes].some(a => a.name.startsWith("on")))
      .map(place));
  const broken = /\b(nan|none|undefined|infinity)\b/i.exec(
    all("td, .figure, .span").map(node => node.textContent).join(" "));
  return {pale, small, wide, cut, ragged, pictures, lost, active,
          broken: broken ? [broken[0]] : []};
})()
