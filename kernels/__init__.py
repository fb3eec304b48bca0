"""The row functions of docs/engine.md in Triton; ``rows`` has the kernels, ``launch`` the functions over tensors."""
