"""The benchmark: cases × providers, every figure a ratio measured in one run."""
