"""Writes the whole OpenS2S model in 8 bits: python quantize_model_once.py"""

import sys

from omnispeech.quantize_cli.commands import quantize_model_once

if __name__ == "__main__":
    sys.exit(quantize_model_once())
