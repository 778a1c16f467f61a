"""Factors that are made from something smaller or from the weight: Uni-LoRA's gather, NEAT's σ(A W), and when."""
