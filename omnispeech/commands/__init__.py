"""One file per command of `omnispeech`: its flags, and what it calls. Nothing heavy is imported
before the arguments are known to be right."""
