"""How far two models' outputs are apart."""
