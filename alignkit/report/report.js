"use strict";
// Says the values under the pointer, and unfolds everything for the printer; the page is whole without it.
(() => {
  window.addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not(.reference)")) fold.open = true;
  });
  const tip = document.getElementById("tip");
  const space = "http://www.w3.org/2000/svg";
  for (const svg of document.querySelectorAll("svg.chart")) {
    const series = JSON.parse(svg.dataset.series).filter((one) => one.points.length);
    const box = svg.viewBox.baseVal;
    const cursor = document.createElementNS(space, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 8);
    cursor.setAttribute("y2", box.height - 22);
    const leave = () => { tip.hidden = true; cursor.remove(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointercancel", leave);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const at = (event.clientX - frame.left) / frame.width * box.width;
      const high = (event.clientY - frame.top) / frame.height * box.height;
      // A path may come back to the same place: the height tells its points apart, a little.
      const near = series.map((one) => one.points.reduce((best, point) => {
        const far = Math.abs(point[0] - at) + Math.abs(point[1] - high) / 1000;
        return far < best[1] ? [point, far] : best;
      }, [null, Infinity]));
      if (!near.length) return;
      const closest = near.reduce((best, one) => one[1] < best[1] ? one : best);
      const x = closest[0][0];
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      svg.append(cursor);
      const lines = [`${svg.dataset.x} ${closest[0][2]}`];
      series.forEach((one, number) => {
        const point = near[number][0];
        if (Math.abs(point[0] - x) < 8) lines.push(one.label ? `${one.label} ${point[3]}` : point[3]);
      });
      tip.textContent = lines.join("\n");
      tip.hidden = false;
      const left = frame.left + x / box.width * frame.width;
      const wide = tip.offsetWidth;
      const place = left + 12 + wide > document.documentElement.clientWidth ? left - wide - 12 : left + 12;
      tip.style.left = `${Math.max(place, 4) + window.scrollX}px`;
      tip.style.top = `${frame.top + window.scrollY + 10}px`;
    });
  }
})();
