"""What is done to one decoder layer: AWQ, GPTQ, plain rounding."""
