// Elements, numbers and streams. Text reaches the page as text nodes only.

export const byId = (id) => document.getElementById(id);

/** An element with properties (dashes: attributes) and children; strings become text nodes. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A number for people: three digits that mean something, or a dash. */
export function number(value, digits) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const places = digits ?? (size >= 100 ? 0 : size >= 10 ? 1 : 2);
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}

export const ms = (value) => (Number.isFinite(value) ? `${number(value, Math.abs(value) < 10 ? 1 : 0)} ms` : "–");
export const percent = (value) => (Number.isFinite(value) ? `${number(100 * value, 0)} %` : "–");

export function setText(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text;
}

/** Replace the rows of a table body: row = [header, ...cells]; numbers stand right. */
export function fillTable(body, rows) {
  body.replaceChildren(
    ...rows.map((row) =>
      el("tr", {}, ...row.map((cell, i) => {
        const right = cell !== null && typeof cell === "object" && !(cell instanceof Node);
        const shown = right ? cell.n : cell;
        return i ? el("td", { className: right ? "n" : "" }, shown) : el("th", { scope: "row" }, shown);
      })),
    ),
  );
}

/** Events of a server-sent stream as [name, data]. */
export async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const blocks = held.split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        let name = "message", data = "";
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (data) yield [name, JSON.parse(data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
