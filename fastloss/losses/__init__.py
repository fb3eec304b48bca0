"""The losses: one file per family, read from the public function downwards."""
