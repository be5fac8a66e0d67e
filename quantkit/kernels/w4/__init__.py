"""Products with weights of four bits: how a weight is packed, which tile multiplies it, and the oracle."""
