"""Quantizes the LLM of OpenS2S once, to stay on disk: python quantize_llm_awq.py"""

import sys

from omnispeech.quantize_cli.commands import quantize_llm_awq

if __name__ == "__main__":
    sys.exit(quantize_llm_awq())
