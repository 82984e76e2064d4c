"""Small checkpoints of random weights, in every file as the published ones.

They are what a newcomer, the tests and the benchmark talk to when no trained model is at hand.
"""
