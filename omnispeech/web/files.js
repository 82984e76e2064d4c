import { RATE_HZ, toPcm } from "./pcm.js";

const LARGEST_MB = 64;
const LONGEST_S = 300; // 19 MB in base64: servers take frames of 24 MB

/** A sound file of a kind that browsers know -> Int16Array, mono, 24 kHz. Raises Error. */
export async function soundOf(file) {
  const sizeMb = file.size / 1e6;
  if (sizeMb > LARGEST_MB) {
    throw new Error(`${file.name} has ${sizeMb.toFixed(0)} MB; send at most ${LARGEST_MB} MB`);
  }
  const decoder = new OfflineAudioContext(1, 1, RATE_HZ); // resamples what it decodes
  const buffer = await decoder.decodeAudioData(await file.arrayBuffer()).catch(() => {
    throw new Error(`${file.name} is no sound this browser can read; try WAV, MP3, FLAC or OGG`);
  });
  if (buffer.duration > LONGEST_S) {
    const seconds = buffer.duration.toFixed(0);
    throw new Error(`${file.name} is ${seconds} s long; send at most ${LONGEST_S} s`);
  }
  return toPcm(mono(buffer));
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function mono(buffer) {
  const mixed = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel += 1) {
    const samples = buffer.getChannelData(channel);
    for (let i = 0; i < mixed.length; i += 1) mixed[i] += samples[i] / buffer.numberOfChannels;
  }
  return mixed;
}
