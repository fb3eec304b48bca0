"""The row functions of docs/engine.md in Triton."""
