// Drawing on a canvas in the colours of the page.

const changed = new Set();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed.forEach((draw) => draw()));

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Call ``draw(context, width, height)`` now, when the size or the theme changes, and by the returned function. */
export function canvas(element, draw) {
  const context = element.getContext("2d");
  let due = 0;
  const paint = () => {
    due = 0;
    const scale = devicePixelRatio || 1, width = element.clientWidth, height = element.clientHeight;
    if (!width || !height) return;
    if (element.width !== Math.round(width * scale) || element.height !== Math.round(height * scale)) {
      element.width = Math.round(width * scale);
      element.height = Math.round(height * scale);
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `11.5px ${color("sans")}`;
    draw(context, width, height);
  };
  const redraw = () => { due ||= requestAnimationFrame(paint); };
  new ResizeObserver(redraw).observe(element);
  changed.add(redraw);
  return redraw;
}

/** A round number at or above ``value``. */
export function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-6)));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((step) => step * power).find((top) => top >= value * 0.999);
}

/** Horizontal lines with their values at the left. */
export function grid(context, left, top, width, height, limit, unit, lines = 2) {
  context.strokeStyle = color("line");
  context.fillStyle = color("muted");
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let i = 0; i <= lines; i++) {
    const y = Math.round(top + height - (i / lines) * height) + 0.5;
    context.beginPath();
    context.moveTo(left, y);
    context.lineTo(left + width, y);
    context.stroke();
    const value = (limit * i) / lines;
    context.fillText(`${Number(value.toPrecision(3))}${i === lines ? ` ${unit}` : ""}`, left - 8, y);
  }
}
