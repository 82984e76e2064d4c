"""What bench.py measures. Nothing of the product imports this."""
