/** Sound as the wire has it: 16-bit, mono, 24 kHz. */

export const RATE_HZ = 24000;
const AT_ONCE = 0x8000; // bytes that one call of fromCharCode takes

export const milliseconds = (samples) => (samples * 1000) / RATE_HZ;

/** Float32Array in [-1, 1] -> Int16Array */
export function toPcm(floats) {
  const pcm = new Int16Array(floats.length);
  for (let i = 0; i < floats.length; i += 1) {
    pcm[i] = Math.round(Math.max(-1, Math.min(1, floats[i])) * 32767);
  }
  return pcm;
}

/** Int16Array -> Float32Array in [-1, 1] */
export function toFloats(pcm) {
  const floats = new Float32Array(pcm.length);
  for (let i = 0; i < pcm.length; i += 1) floats[i] = pcm[i] / 32768;
  return floats;
}

export function toBase64(pcm) {
  const bytes = new Uint8Array(pcm.buffer, pcm.byteOffset, pcm.byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += AT_ONCE) {
    text += String.fromCharCode.apply(null, bytes.subarray(at, at + AT_ONCE));
  }
  return btoa(text);
}

export function fromBase64(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length & ~1);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Int16Array(bytes.buffer);
}

export function joined(pieces) {
  const whole = new Int16Array(pieces.reduce((length, piece) => length + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

/** Root mean square in [0, 1] of a Float32Array. */
export function loudness(floats) {
  let sum = 0;
  for (const value of floats) sum += value * value;
  return floats.length ? Math.sqrt(sum / floats.length) : 0;
}

/** Largest magnitudes in [0, 1] of `count` equal parts: the outline of a sound. */
export function outline(pcm, count) {
  const peaks = new Array(count).fill(0);
  for (let i = 0; i < pcm.length; i += 1) {
    const part = Math.floor((i * count) / pcm.length);
    peaks[part] = Math.max(peaks[part], Math.abs(pcm[i]) / 32768);
  }
  return peaks;
}

/** A stereo WAV file from two Int16Arrays of the same length. */
export function wavFile(left, right) {
  const frames = new Int16Array(2 * left.length);
  for (let i = 0; i < left.length; i += 1) {
    frames[2 * i] = left[i];
    frames[2 * i + 1] = right[i];
  }
  return new Blob([header(frames.byteLength), frames], { type: "audio/wav" });
}

function header(bytes) {
  const view = new DataView(new ArrayBuffer(44));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 2, true); // channels
  view.setUint32(24, RATE_HZ, true);
  view.setUint32(28, RATE_HZ * 4, true); // bytes a second
  view.setUint16(32, 4, true); // bytes of a frame
  view.setUint16(34, 16, true); // bits
  word(36, "data");
  view.setUint32(40, bytes, true);
  return view.buffer;
}
