// Unpacks lines (the inverse of reports/lines.py) and draws thousands of them onto a canvas.

const MISSING = 32767;

/** The bytes that base64 stands for; browsers from before 2025 need the loop. */
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
}

async function inflate(base64) {
  const stream = new DecompressionStream("deflate-raw");
  const writer = stream.writable.getWriter();
  const written = writer.write(bytesOf(base64)).then(() => writer.close());
  const [buffer] = await Promise.all([new Response(stream.readable).arrayBuffer(), written]);
  return buffer;
}

/** Values of all lines, one after another: value of line l at row r is values[l * rows + r]. */
async function unpackLines({ lines, rows, top, levels, data }) {
  const planes = new Uint8Array(await inflate(data));
  return decodePlanes(planes, lines, rows, top / (levels - 1));
}

// A function of its own, because the engine optimises a loop in an async one late or never.
function decodePlanes(planes, lines, rows, step) {
  const size = lines * rows;
  const values = new Float32Array(size);
  for (let line = 0, i = 0; line < lines; line++) {
    for (let row = 0, code = 0; row < rows; row++, i++) {
      const zigzag = planes[i] | (planes[size + i] << 8);
      code += (zigzag >>> 1) ^ -(zigzag & 1);
      values[i] = code === MISSING ? NaN : code === 0 ? 0 : code === 1 ? step / 4 : (code - 1) * step;
    }
  }
  return values;
}

/** OKLCH to sRGB: equal lightness for every hue, so that no filter shouts. */
function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos(hue), b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => 255 * Math.min(1, Math.max(0, x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055)));
}

/** An image of one colour, "#rrggbb". */
function blank(width, height, colour) {
  const image = new ImageData(width, height);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  new Uint32Array(image.data.buffer).fill((255 << 24) | (blue << 16) | (green << 8) | red);
  return image;
}

/** One colour per line; the golden angle keeps neighbours apart, three lightnesses the rest. */
function lineColour(line, dark) {
  const lightness = (dark ? 0.72 : 0.6) + 0.09 * ((line % 3) - 1);
  return oklch(lightness, 0.135, line * 2.399963229728653);
}

/**
 * Draw lines into an image, column by column: in each pixel column a line covers the span between
 * its lowest and highest value there, softened at both ends. The cost depends on the pixels and
 * hardly on the number of stored rows, and no dip is lost, however narrow.
 */
function drawLines(image, { values, lines, rows, x }, [low, high], dark) {
  const { width, height } = image;
  const pixels = new Int32Array(image.data.buffer);
  const least = new Float32Array(width), most = new Float32Array(width);
  const half = 0.5 * Math.max(1, window.devicePixelRatio || 1);
  // Rows beyond the visible range, but for one on either side, need no work.
  let first = 0, last = rows - 1;
  while (first < rows - 2 && x[first + 1] < 0) first++;
  while (last > 1 && x[last - 1] > width) last--;
  const columns = Int32Array.from(x, (at) => Math.max(-1, Math.min(width, Math.floor(at))));
  for (let line = 0; line < lines; line++) {
    least.fill(Infinity);
    most.fill(-Infinity);
    spans(values, line * rows, x, columns, first, last, least, most);
    blend(pixels, width, height, least, most, low, height / (high - low), half, lineColour(line, dark));
  }
}

/** Find each pixel column's lowest and highest value of one line; a NaN leaves a gap. */
function spans(values, at, x, columns, first, last, least, most) {
  const width = least.length;
  let before = values[at + first], column = columns[first];
  let low = before, high = before;
  for (let row = first + 1; row <= last; row++) {
    const value = values[at + row], next = columns[row];
    if (next === column) {
      // The common case by far. A NaN fails both comparisons.
      if (value < low) low = value;
      if (value > high) high = value;
      if (low !== low) low = high = value;
    } else {
      const slope = (value - before) / (x[row] - x[row - 1]);
      const from = x[row - 1];
      // Where the line enters the next column it leaves this one.
      for (let edge = column + 1; edge <= next; edge++) {
        const crossing = before + (edge - from) * slope;
        if (crossing < low || low !== low) low = crossing;
        if (crossing > high || high !== high) high = crossing;
        if (edge > 0 && edge <= width && low === low) {
          least[edge - 1] = low;
          most[edge - 1] = high;
        }
        low = high = crossing;
      }
      if (value < low || low !== low) low = value;
      if (value > high || high !== high) high = value;
      column = next;
    }
    before = value;
  }
  if (column >= 0 && column < width && low === low) {
    least[column] = low;
    most[column] = high;
  }
}

/** Blend one line's spans into the pixels: red and blue together, then green, in whole numbers. */
function blend(pixels, width, height, least, most, low, scale, half, [red, green, blue]) {
  const outer = (Math.round(blue) << 16) | Math.round(red), inner = Math.round(green) << 8;
  for (let column = 0; column < width; column++) {
    if (most[column] < least[column]) continue;
    const a = Math.max(0, height - (most[column] - low) * scale - half);
    const b = Math.min(height, height - (least[column] - low) * scale + half);
    for (let y = Math.floor(a), i = y * width + column; y < b; y++, i += width) {
      const top = a > y ? a : y, bottom = b < y + 1 ? b : y + 1;
      const cover = (218 * (bottom - top)) | 0, rest = 256 - cover; // 218 / 256: nearly opaque
      const under = pixels[i];
      const rb = Math.imul(under & 0xff00ff, rest) + Math.imul(outer, cover) + 0x800080;
      const g = Math.imul(under & 0xff00, rest) + Math.imul(inner, cover) + 0x8000;
      pixels[i] = 0xff000000 | ((rb >>> 8) & 0xff00ff) | ((g >>> 8) & 0xff00);
    }
  }
}

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];
const ZERO_INK = [213, 94, 0];

/** Draw lines as rows of a heat map, in the order given; exact zeros in their own colour. */
function drawHeatMap(image, { values, rows, x }, order, [low, high], top) {
  const { width, height, data } = image;
  const rowAt = new Int32Array(width).fill(-1);
  for (let column = 0, row = 0; column < width; column++) {
    while (row < rows - 1 && x[row + 1] <= column + 0.5) row++;
    if (x[0] <= column + 1 && x[rows - 1] >= column - 1) rowAt[column] = row;
  }
  for (let y = 0; y < height; y++) {
    const place = Math.floor(low + ((height - y - 0.5) / height) * (high - low));
    if (place < 0 || place >= order.length) continue;
    const at = order[place] * rows;
    for (let column = 0; column < width; column++) {
      if (rowAt[column] < 0) continue;
      const value = values[at + rowAt[column]];
      if (value !== value) continue;
      const share = Math.min(1, value / top) * (VIRIDIS.length - 1);
      const k = Math.min(VIRIDIS.length - 2, Math.floor(share));
      const i = 4 * (y * width + column);
      for (let c = 0; c < 3; c++) {
        data[i + c] = value === 0 ? ZERO_INK[c]
          : VIRIDIS[k][c] + (VIRIDIS[k + 1][c] - VIRIDIS[k][c]) * (share - k);
      }
    }
  }
}

const BANDS = [[0, 1, 0.14], [0.05, 0.95, 0.24], [0.25, 0.75, 0.4]];

/** Draw minimum to maximum, 5 to 95 %, quartiles and the median of all lines. */
function drawBands(context, { values, lines, rows, x }, [low, high], colour) {
  const { height } = context.canvas;
  const stride = Math.max(1, Math.floor(rows / 400));
  const kept = [], sorted = [];
  for (let row = 0; row < rows; row += stride) {
    const column = new Float32Array(lines);
    for (let line = 0; line < lines; line++) column[line] = values[line * rows + row];
    kept.push(x[row]);
    sorted.push(column.filter((value) => value === value).sort());
  }
  const y = (k, q) => {
    const all = sorted[k];
    return height - ((all[Math.round(q * (all.length - 1))] - low) / (high - low)) * height;
  };
  context.fillStyle = context.strokeStyle = colour;
  for (const [from, to, opacity] of BANDS) {
    context.globalAlpha = opacity;
    context.beginPath();
    kept.forEach((at, k) => context.lineTo(at, y(k, to)));
    for (let k = kept.length - 1; k >= 0; k--) context.lineTo(kept[k], y(k, from));
    context.fill();
  }
  context.globalAlpha = 1;
  context.lineWidth = 2 * (window.devicePixelRatio || 1);
  context.beginPath();
  kept.forEach((at, k) => context.lineTo(at, y(k, 0.5)));
  context.stroke();
}
