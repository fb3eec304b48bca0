"""The training harness: plain loops over a `transformers` model, for pretraining now and for later stages."""
