"""The small model: trained, small enough to be a part of the package, in the published formats.

What it can be asked is in MODEL_CARD.md, how it was made in `training`.
"""
