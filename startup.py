"""Fetches what is missing, then becomes the worker: python startup.py --models /models"""

import sys
from pathlib import Path

from omnispeech.cli import startup

if __name__ == "__main__":
    sys.exit(startup(Path(__file__).resolve().parent))
