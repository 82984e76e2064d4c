"""Quantizes a Hugging Face text model: python quantize.py --model_path /models --awq"""

import sys

from omnispeech.quantize_cli.commands import quantize

if __name__ == "__main__":
    sys.exit(quantize())
