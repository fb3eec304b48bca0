"""torch.library operators, autograd functions, and one adapter per backend."""
