"""Starts one worker: python model_worker.py --models /models --port 8000"""

import sys

from omnispeech.cli import worker

if __name__ == "__main__":
    sys.exit(worker())
