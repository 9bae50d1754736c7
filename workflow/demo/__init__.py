"""Demo data and demo model: real catalogue rows, simulated pixels, a small AstroMAE."""
