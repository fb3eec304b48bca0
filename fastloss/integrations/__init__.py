"""fastloss inside the trainers that people already have: one module each, ``apply()`` in, ``undo()`` out."""

from fastloss.integrations.handle import Handle

__all__ = ["Handle"]
