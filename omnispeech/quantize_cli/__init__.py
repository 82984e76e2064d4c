"""The commands that quantize: `quantize.py`, `quantize_llm_awq.py`, `quantize_model_once.py`."""
