"""From a model, a cache and what was asked for to a plan: how every tensor is quantized."""
