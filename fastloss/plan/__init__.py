"""What training a language model costs: FLOPs, hours, memory, and the loss layer's part in each (docs/plan.md)."""
