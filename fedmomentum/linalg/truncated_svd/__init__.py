"""The best rank-r approximation of a weighted sum of low-rank matrices, and its exact residual."""
