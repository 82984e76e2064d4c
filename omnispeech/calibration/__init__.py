"""What a quantizer listens to: items, their tokens, and the vectors a model reads them as."""
